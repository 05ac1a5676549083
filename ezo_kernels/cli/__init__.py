"""The program ``ezo``: train, eval, replay, info, data, profile, experiment, cut.

Every error is one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
import sys
import traceback

#: what a bad option, a bad file, a missing package or a size beyond memory raises; anything else is a defect of ours and
#: keeps its traceback
EXPECTED = (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError)


def main(argv: list[str] | None = None) -> int:
    """Run a command line (``sys.argv`` if None) and return its exit code."""
    # Imported here: importing the package does not import argparse's tree, tqdm and the like.
    from .parser import UsageError, build

    show = False
    try:
        args = build().parse_args(argv)
        show = args.traceback
        if args.command == "train":
            from .train import train as command
        elif args.command == "replay":
            from .replay import replay as command
        elif args.command == "profile":
            from .profile import profile as command
        elif args.command == "cut":
            from .cut import cut as command
        elif args.command == "experiment":
            from .experiments.run import experiment as command
        else:
            from . import commands

            command = {"eval": commands.evaluate, "info": commands.info, "data": commands.data}[args.command]
        status = command(args)
        if sys.stdout is not None:  # closed by who started this: `ezo ... >&-`
            sys.stdout.flush()  # a pipe whose reader has left says so here, and not while the interpreter ends
        return status
    except BrokenPipeError:
        # `ezo ... | head` has what it wanted; what is still buffered must not fail again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 and SIGPIPE, as a shell has it of any other program
    except (UsageError, *EXPECTED) as error:
        if show:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"ezo: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ezo: interrupted", file=sys.stderr)
        return 130
