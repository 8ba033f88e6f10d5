"""A worker that fails as an engine does: with a traceback, and noise after it."""

import atexit

atexit.register(print, "shutting down")
raise ValueError("no such thing")
