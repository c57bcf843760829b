"""Runs programs that a model wrote, where they can do no harm.

outside.py      starts a program in a process of its own and watches it: wall clock, size of its folder, its end
inside.py       that process: confines itself, then runs the program
namespaces.py   user namespaces: no network, no other process, a file system with little in it
landlock.py     the same of files where user namespaces are not allowed
seccomp.py      system calls that no program needs: sockets, other processes, mounts, signals to others
linux.py        the system calls behind these

Every program is confined by resource limits and `seccomp` and, for files, by one of the other two; where the kernel has
neither, no program runs. A program is in one interpreter with its own tests: it cannot harm anybody, but one that means
to may claim to have passed.
"""

from opd_megatron.tasks.sandbox.outside import Limits, Outcome, SandboxError, confinement, run_program

__all__ = ["Limits", "Outcome", "SandboxError", "confinement", "run_program"]
