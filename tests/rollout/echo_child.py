"""A stand-in for the vLLM server: answers, refuses, dies or hangs when told to."""

import os
import sys
import time
from multiprocessing import shared_memory
from multiprocessing.connection import Connection


def main() -> None:
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            name, argument = connection.recv()
        except EOFError:
            return
        if name == "refuse":
            connection.send(("refused", argument))
        elif name == "die":
            print("ValueError: " + argument, "and then some chatter", sep="\n", flush=True)
            os._exit(3)
        elif name == "hang" or (name == "start" and argument == "forever"):
            time.sleep(600)
        elif name == "slow":  # says how far it is, for longer than any one request may take
            for done in range(argument):
                time.sleep(0.5)
                connection.send(("progress", (done, argument)))
            connection.send(("ok", argument))
        elif name == "stall":
            connection.send(("progress", (1, 2)))
            time.sleep(600)
        elif name == "start":
            connection.send(("ok", _hold_shared_memory()))
        else:
            connection.send(("ok", argument))


_held = []


def _hold_shared_memory() -> list[str]:
    """Holds a piece of shared memory here and another in a process of its own, as vLLM and its workers do."""
    theirs = shared_memory.SharedMemory(create=True, size=4096)
    if os.fork() == 0:
        theirs.buf[0] = 1
        time.sleep(600)
        os._exit(0)
    name = theirs.name
    theirs.close()
    mine = shared_memory.SharedMemory(create=True, size=4096)
    mine.buf[0] = 1
    _held.append(mine)
    return [name, mine.name]


if __name__ == "__main__":
    main()
