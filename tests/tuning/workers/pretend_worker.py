"""`pretend_worker.py run|finish STUDY NAME [KEY=VALUE ...]`: a worker, or the end of a study, of pretended runs."""

import sys
from pathlib import Path

from swiftv2.config.tune import load_study
from swiftv2.errors import SwiftError
from swiftv2.terminal import warn
from swiftv2.tuning.finish import finish
from swiftv2.tuning.worker import Worker

PRETENDED = [sys.executable, str(Path(__file__).with_name("pretend_finetune.py"))]


def main() -> int:
    verb, study, name, *words = sys.argv[1:]
    config = load_study(study, tuple(words))
    try:
        if verb == "finish":
            finish(config, warn, PRETENDED)
            return 0
        return Worker(config, name, warn, PRETENDED, poll_seconds=0.05).run()
    except SwiftError as error:
        warn(str(error))
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
