"""Parent of an engine process: ends the engine's whole group when the gateway is gone.

Run as a script, in a session of its own, with the engine's command as arguments and a pipe from
the gateway as standard input. The pipe closes when the gateway ends, however it ends, also by
`kill -9`. When the pipe closes, or the engine's first process exits, every process of the group
is killed, this one included. A SIGTERM is passed on to the engine's first process alone, which
then finishes what it is doing.

Imports nothing but the standard library: it lives in every engine's memory.
"""

import os
import select
import signal
import subprocess
import sys


def main(command: list[str]) -> None:
    # Blocked until the engine exists, so that a SIGTERM in between is not lost.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    engine = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM}),
    )
    signal.signal(signal.SIGTERM, lambda *_: engine.terminate())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    gateway, exited = sys.stdin.fileno(), os.pidfd_open(engine.pid)
    poller = select.poll()
    poller.register(gateway, select.POLLIN | select.POLLHUP)
    poller.register(exited, select.POLLIN)
    ready = [descriptor for descriptor, _ in poller.poll()]
    if exited in ready:
        last_words = f"engine process {engine.pid} ended with status {engine.wait()}"
    else:
        last_words = f"the gateway is gone: killing engine process {engine.pid}"
    sys.stdout.write(last_words + "\n")
    sys.stdout.flush()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
