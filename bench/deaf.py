"""What a process imports that others are forked from: it ends with the pool that started it, not
with a signal to all of the pool's processes, before those that it watches have saved their work.
"""

import signal

signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
