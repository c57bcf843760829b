"""A filter of system calls (seccomp, `man 2 seccomp`) in classic BPF: what no program needs is refused with EPERM."""

from __future__ import annotations

import ctypes
import errno
import os
import struct

from opd_megatron.tasks.sandbox import linux

_X86, _ARM = "x86_64", "aarch64"
_AUDIT_ARCH = {_X86: 0xC000003E, _ARM: 0xC00000B7}
_SECCOMP_SET_MODE_FILTER, _SECCOMP_GET_ACTION_AVAIL = 1, 2
_SECCOMP_NUMBER = {_X86: 317, _ARM: 277}
_KILL, _ERRNO, _ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_CLONE_THREAD, _PR_SET_PDEATHSIG = 0x00010000, linux.PR_SET_PDEATHSIG
_X32 = 0x40000000

# Name -> numbers on x86_64 and aarch64; None where there is none.
_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # the network, and what leads out of the file system
    "socket": (41, 198), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201), "accept": (43, 202),
    "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "mknod": (133, None), "mknodat": (259, 33),
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "process_madvise": (440, 440), "setsid": (112, 157),
    "setpgid": (109, 154), "setpriority": (141, 140), "sched_setscheduler": (144, 119), "sched_setattr": (314, 274),
    "sched_setparam": (142, 118), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    # who it is, and where
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "unshare": (272, 97),
    "setns": (308, 268), "setuid": (105, 146), "setgid": (106, 144), "setreuid": (113, 145), "setregid": (114, 143),
    "setresuid": (117, 147), "setresgid": (119, 149), "setgroups": (116, 159), "capset": (126, 91),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsmount": (432, 432),
    "mount_setattr": (442, 442), "sethostname": (170, 161), "setdomainname": (171, 162),
    # doors into the kernel
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "keyctl": (250, 219), "add_key": (248, 217),
    "request_key": (249, 218), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "syslog": (103, 116), "quotactl": (179, 60),
    "acct": (163, 89), "settimeofday": (164, 170), "clock_settime": (227, 112), "adjtimex": (159, 171),
    "iopl": (172, None), "ioperm": (173, None), "personality": (135, 92), "memfd_secret": (447, 447),
    "lookup_dcookie": (212, 18), "vhangup": (153, 58), "fanotify_init": (300, 262),
}  # fmt: skip
_CLONE, _CLONE3, _PRCTL, _PRLIMIT = (56, 220), (435, 435), (157, 167), (302, 261)
_SIGNALS = ((62, 129), (200, 130), (234, 131))
"""kill, tkill, tgkill: to itself alone."""

# BPF: load a word of seccomp_data, jump if equal / at least / any bit set, return.
_LOAD, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _FIRST, _FIRST_HIGH = 0, 4, 16, 20


def available() -> bool:
    """Whether this kernel has it, and its calls are known for this machine."""
    if linux.MACHINE not in _AUDIT_ARCH:
        return False
    action = ctypes.c_uint32(_ERRNO)
    try:
        linux.syscall(
            "seccomp", _SECCOMP_NUMBER[linux.MACHINE], _SECCOMP_GET_ACTION_AVAIL, 0, ctypes.byref(action)
        )  # fmt: skip
    except OSError:
        return False
    return True


def confine() -> None:
    """Applies the filter to this process, for good. Raises OSError."""
    code = _program(linux.MACHINE, os.getpid())
    instructions = b"".join(struct.pack("HBBI", *each) for each in code)
    buffer = ctypes.create_string_buffer(instructions)
    header = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.syscall(
        "seccomp", _SECCOMP_NUMBER[linux.MACHINE], _SECCOMP_SET_MODE_FILTER, 0,
        ctypes.c_char_p(header),
    )  # fmt: skip


def _program(machine: str, pid: int) -> list[tuple[int, int, int, int]]:
    """(code, jump if true, jump if false, value) of each instruction."""
    column = 0 if machine == _X86 else 1
    refuse = (_RETURN, 0, 0, _ERRNO | errno.EPERM)
    code = [
        (_LOAD, 0, 0, _ARCH), (_EQUAL, 1, 0, _AUDIT_ARCH[machine]), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL),
        # Without it, the C library makes threads by clone, whose flags can be seen.
        (_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
        # if number == clone: refuse unless it makes a thread
        (_EQUAL, 0, 4, _CLONE[column]), (_LOAD, 0, 0, _FIRST), (_BITS, 1, 0, _CLONE_THREAD), refuse,
        (_RETURN, 0, 0, _ALLOW),
        # if number == prctl: not the signal that ends it with its parent
        (_EQUAL, 0, 4, _PRCTL[column]), (_LOAD, 0, 0, _FIRST), (_EQUAL, 0, 1, _PR_SET_PDEATHSIG), refuse,
        (_RETURN, 0, 0, _ALLOW),
        # if number == prlimit64: of itself alone
        (_EQUAL, 0, 4, _PRLIMIT[column]), (_LOAD, 0, 0, _FIRST), (_EQUAL, 1, 0, 0), refuse, (_RETURN, 0, 0, _ALLOW),
    ]  # fmt: skip
    for numbers in _SIGNALS:
        code += [
            (_EQUAL, 0, 4, numbers[column]), (_LOAD, 0, 0, _FIRST), (_EQUAL, 1, 0, pid), refuse,
            (_RETURN, 0, 0, _ALLOW),
        ]  # fmt: skip
    for found in _REFUSED.values():
        number = found[column]
        if number is not None:
            code += [(_EQUAL, 0, 1, number), refuse]
    return [*code, (_RETURN, 0, 0, _ALLOW)]
