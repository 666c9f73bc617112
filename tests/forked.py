"""What a forked process of the tests does: its work, into a log, and nothing of what its parent would do next."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def work_and_leave(log: Path, work: Callable[[], int]) -> NoReturn:
    """End this process with what `work` returns, 130 where it is interrupted, 1 where it fails."""
    code = 1
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = work()
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
