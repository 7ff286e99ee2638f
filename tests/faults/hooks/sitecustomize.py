"""Loaded by every Python that the chaos house starts, as the first thing: traps for Celery, a clock that is off.

Python imports a module of this name by itself when its folder is on the path; the product knows nothing of it.
"""

from __future__ import annotations

import os
import sys
import time

OFF = float(os.environ.get("CHAOS_CLOCK", "0"))

if OFF:
    true_time, true_time_ns = time.time, time.time_ns
    time.time = lambda: true_time() + OFF
    time.time_ns = lambda: true_time_ns() + int(OFF * 1e9)

if "celery" in sys.orig_argv and "worker" in sys.orig_argv:
    from celery.signals import worker_process_init

    # A receiver that only its sender's dictionary knows would be collected at once.
    @worker_process_init.connect(weak=False)
    def lay(**_: object) -> None:
        from tests.faults import traps

        traps.lay()
