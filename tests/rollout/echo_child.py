"""A stand-in for the vLLM server: answers, refuses, dies or hangs when told to."""

import os
import sys
import time
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
        else:
            connection.send(("ok", argument))


if __name__ == "__main__":
    main()
