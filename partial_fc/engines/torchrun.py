"""torchrun, with an exit code that says what its ranks' codes say.

    python -m partial_fc.engines.torchrun --nnodes 2 --node_rank 0 ... -m partial_fc train CONFIG

takes torchrun's options and runs it in this process. torchrun exits with 1 whatever happened; a scheduler that decides
by exit codes whether to start a job again needs more:

    0          complete
    75         the ranks were asked to stop and have saved, or torchrun itself got the signal: run it again
    2          an error in the settings or data: running it again does not help
    128 + n    the first rank that failed was killed by signal n
    others     the code of the first rank that failed

SIGUSR1 is taken for SIGTERM, which torchrun passes on to its ranks: Slurm sends it to all processes of a step.
"""

from __future__ import annotations

import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from partial_fc.loop.preemption import SIGNALS, PreemptionGuard


def main(arguments: list[str] | None = None) -> int:
    """Run torchrun with its arguments; return the exit code for this process, as above.

    Ctrl-C gives 130. Other errors of torchrun itself, such as a rendezvous that fails, are not caught.
    """
    os.environ["PARTIAL_FC_LAUNCHER"] = str(os.getpid())  # ranks that are started while it is killed find out by it
    for each in SIGNALS:
        if each != signal.SIGTERM:
            signal.signal(each, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        run.main(sys.argv[1:] if arguments is None else arguments)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        _, first = error.get_first_failure()
        return first.exitcode if first.exitcode >= 0 else 128 - first.exitcode
    except SignalException as error:
        asked = error.sigval in SIGNALS  # the ranks got the signal, too, and time to save
        return PreemptionGuard.EXIT_CODE if asked else 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
