"""``python -m bench COMMAND``: the library's measurements, one module a command."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import cpu, estimate, gpu, input_moments, int8_signal, ladder, memory, report, roofline, static

COMMANDS = {
    "cpu": cpu,
    "estimate": estimate,
    "gpu": gpu,
    "input-moments": input_moments,
    "int8-signal": int8_signal,
    "ladder": ladder,
    "memory": memory,
    "report": report,
    "roofline": roofline,
    "static": static,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in COMMANDS.items():
        summary = module.__doc__.splitlines()[0]
        module.configure(commands.add_parser(name, help=summary, description=summary))
    args = parser.parse_args(argv)
    for option in ("json", "lines"):  # before minutes of measuring, not after them
        path = getattr(args, option, None)
        if path is not None and not Path(path).parent.is_dir():
            parser.error(f"--{option} {path}: there is no folder {Path(path).parent}")
    return COMMANDS[args.command].run(args)


if __name__ == "__main__":
    sys.exit(main())
