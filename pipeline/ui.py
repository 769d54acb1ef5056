"""`mario ui`: MLflow's pages over the store that the stages write to, for this machine only."""

import os
import socket
import sys
from pathlib import Path

from pipeline.errors import UserError

HOST = "127.0.0.1"
DATABASE = Path("mlflow.db")


def serve(port: int) -> int:
    """Becomes MLflow's server; comes back only where one runs elsewhere.

    Raises:
        UserError: nothing is recorded yet, or the port is taken
    """
    store = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or f"sqlite:///{DATABASE}"
    if store.startswith("http"):
        print(f"the stages record at {store} (MLFLOW_TRACKING_URI); open it in the browser")
        return 0
    if store == f"sqlite:///{DATABASE}" and not DATABASE.exists():
        raise UserError(f"{DATABASE}: no runs recorded here yet; make demo")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"port {port}: {reason}; choose another: mario ui --port N") from None
    print(f"MLflow: http://{HOST}:{port} (Ctrl-C ends it)", flush=True)
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    command = ["-m", "mlflow", "server", "--host", HOST, "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--default-artifact-root", Path("mlartifacts").resolve().as_uri()]
    os.execv(sys.executable, [sys.executable, *command])
