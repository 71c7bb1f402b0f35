"""`python -m learner.pretrained.check NAME [--arch NAME] [--out FILE]`: what a backbone is, as one JSON document.

With --out it writes the encoder to a safetensors file first. Exit 1 with one line on stderr where it can't be read.
"""

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path

from cxrloop.durable import write_atomic
from learner.errors import LearnerError
from learner.pretrained.reader import Pretrained, as_file, examine, read_pretrained
from learner.round.backbone_file import SUFFIX, is_file_name


def main(arguments: list[str] | None = None) -> int:
    """Print the document; return the exit code: 0 also for a backbone with unused or missing tensors."""
    parser = argparse.ArgumentParser(prog="python -m learner.pretrained.check")
    parser.add_argument("name", help="a file, a timm name, or OWNER/REPOSITORY[/FILE] on the hub")
    parser.add_argument("--arch", default="", help="timm name of a file that does not say it")
    parser.add_argument("--out", type=Path, help="write the encoder to this new safetensors file")
    options = parser.parse_args(arguments)
    try:
        read = fetch(options.name, options.out, options.arch) if options.out else examine(options.name, options.arch)
    except (LearnerError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps(read.report()) + "\n")
    return 0


def fetch(name: str, out: Path, arch: str = "") -> Pretrained:
    """Write the encoder of a file or of a model of the hub to a new file; return what the new file is.

    Raises LearnerError where tensors are unused or missing, or `out` exists.
    """
    if not is_file_name(str(out)):
        raise LearnerError(f"--out {out}: the file's name must end with {SUFFIX}")
    if out.exists():
        raise LearnerError(f"--out {out}: exists; give another name, or remove it")
    if not out.parent.is_dir():
        raise LearnerError(f"--out {out}: no folder {out.parent}; make it")
    write_atomic(out, as_file(examine(name, arch).require_whole(name)))
    return read_pretrained(out)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # of the hub's library: hints about logins
    sys.exit(main())
