"""`mario`, the command line. It imports what a command needs only when that command runs."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.errors import UserError
from pipeline.launch import SILENT


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    os.environ.update(SILENT)
    if argv[:1] == ["play"]:  # its arguments are its own, --help too
        os.execv(sys.executable, [sys.executable, "-m", "stages", *argv])
    args = parser().parse_args(argv)
    try:
        code = args.run(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    sys.exit(code)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="mario", description="DreamerV3 learns Super Mario Bros from pixels.")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser("demo", help="the whole pipeline on the CPU in a few minutes, then where to look")
    demo.set_defaults(run=_demo)

    run = commands.add_parser("run", help="run what changed as a Prefect flow, in processes or containers")
    run.add_argument(
        "--runner", choices=("process", "docker"), help="where stages run; default: $MARIO_RUNNER, or process"
    )
    run.add_argument("--profile", metavar="NAME", help="another than params.yaml's, for this run")
    run.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter for this run: train.steps=20000"
    )
    run.add_argument("--minutes", type=float, metavar="N", help="stop resumably after so long; default: runner.minutes")
    run.set_defaults(run=_run)

    status = commands.add_parser("status", help="what is up to date, what changed, what goes on where it stopped")
    status.set_defaults(run=_status)

    commands.add_parser("play", help="a trained agent plays (mario play --help)", add_help=False)

    image = commands.add_parser("image", help="the image in which MARIO_RUNNER=docker runs stages")
    actions = image.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="build it, with packages as locked")
    build.add_argument("--services", action="store_true", help="that of docker/compose.yaml and the Docker work pool")
    build.add_argument(
        "--base",
        metavar="IMAGE",
        help="image with Python 3.13 to start from; default: $BASE_IMAGE, or python:3.13-slim",
    )
    build.set_defaults(run=_image_build)

    deploy = commands.add_parser("deploy", help="send prefect.yaml's deployments to the Prefect server")
    deploy.set_defaults(run=_deploy)

    doctor = commands.add_parser(
        "doctor", help="what this machine has of what is needed, and what to do about the rest"
    )
    doctor.set_defaults(run=_doctor)

    models = commands.add_parser("models", help="registered models and their results; --history: champions, and why")
    models.add_argument("--history", action="store_true", help="who was champion from when on, and why")
    models.add_argument("--json", action="store_true")
    models.set_defaults(run=_models)

    promote = commands.add_parser("promote", help="make a model champion if it is measurably better")
    promote.add_argument("version", nargs="?", default="challenger", metavar="VERSION", help="default: %(default)s")
    promote.add_argument("--force", action="store_true", help="whatever the numbers say; needs --reason")
    promote.add_argument("--reason", metavar="WHY", help="what the log will say")
    promote.add_argument("--automatic", action="store_true", help="only if promote.automatic of params.yaml says so")
    promote.set_defaults(run=_promote)

    rollback = commands.add_parser("rollback", help="make the champion before the present one champion again")
    rollback.add_argument("version", nargs="?", metavar="VERSION", help="an earlier champion; default: the last one")
    rollback.add_argument("--reason", metavar="WHY", help="what the log will say")
    rollback.set_defaults(run=_rollback)

    lineage = commands.add_parser("lineage", help="where a registered model comes from")
    lineage.add_argument("version", metavar="VERSION", help="number or alias")
    lineage.add_argument("--json", action="store_true")
    lineage.set_defaults(run=_lineage)

    reproduce = commands.add_parser("reproduce", help="the commands that build a registered model again")
    reproduce.add_argument("version", metavar="VERSION", help="number or alias")
    reproduce.add_argument("--run", dest="execute", action="store_true", help="run them, in a clone beside this one")
    reproduce.add_argument("--directory", type=Path, metavar="DIR", help="of the clone")
    reproduce.set_defaults(run=_reproduce)

    ui = commands.add_parser("ui", help="MLflow in the browser: runs, charts, registered models")
    ui.add_argument("--port", type=int, default=5000, metavar="N", help="default: %(default)s")
    ui.set_defaults(run=_ui)
    return top


def _demo(args: argparse.Namespace) -> int:
    from pipeline import demo

    return demo.run()


def _run(args: argparse.Namespace) -> int:
    from pipeline import run

    return run.run(args.profile, args.set, args.runner, args.minutes)


def _status(args: argparse.Namespace) -> int:
    from pipeline import status

    print(status.describe())
    return 0


def _image_build(args: argparse.Namespace) -> int:
    from pipeline import image

    return image.build(args.services, args.base)


def _deploy(args: argparse.Namespace) -> int:
    from pipeline import deployments

    return deployments.deploy()


def _doctor(args: argparse.Namespace) -> int:
    from pipeline import doctor

    return doctor.examine()


def _models(args: argparse.Namespace) -> int:
    from pipeline import models

    print(models.history(args.json) if args.history else models.listed(args.json))
    return 0


def _promote(args: argparse.Namespace) -> int:
    from pipeline import promote

    return promote.promote(args.version, args.reason, args.force, args.automatic)


def _rollback(args: argparse.Namespace) -> int:
    from pipeline import promote

    return promote.rollback(args.version, args.reason)


def _lineage(args: argparse.Namespace) -> int:
    from pipeline import lineage

    print(lineage.show(args.version, args.json))
    return 0


def _reproduce(args: argparse.Namespace) -> int:
    from pipeline import lineage

    return lineage.reproduce(args.version, args.execute, args.directory)


def _ui(args: argparse.Namespace) -> int:
    from pipeline import ui

    return ui.serve(args.port)


if __name__ == "__main__":
    main()
