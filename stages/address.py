"""Where the tracking store is, and how to say in one line what is wrong with it."""

import os
from urllib.parse import urlsplit

from stages import paths


class TrackingError(RuntimeError):
    """The tracking store cannot be used. The message is one line, naming it and the remedy."""


def tracking_uri() -> str:
    """Of MLFLOW_TRACKING_URI or the repository's own database, with its file's path made absolute.

    Raises:
        TrackingError: it is no address of a store
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or "sqlite:///mlflow.db"
    scheme, _, rest = uri.partition("://")
    if scheme == "sqlite" and rest.startswith("/") and rest != "/":
        return f"sqlite:///{paths.ROOT / rest[1:]}"
    if scheme.partition("+")[0] not in ("http", "https", "postgresql", "mysql", "mssql") or not rest.strip("/"):
        raise TrackingError(
            f"MLFLOW_TRACKING_URI={without_password(uri)}: no address of a tracking store; "
            "set it to http://HOST:PORT, or unset it to use sqlite:///mlflow.db"
        )
    return uri.rstrip("/")


def explained(name: str, error: Exception) -> str:
    """One line for a store that failed at once."""
    text = " ".join(str(error).split())
    if name.startswith("http"):
        host = urlsplit(name).netloc
        remedy = "unset MLFLOW_TRACKING_URI to use sqlite:///mlflow.db"
        if "failed with exception" in text or "timeout" in text:
            port = urlsplit(name).port or 5000
            return f"{name}: no MLflow server answers there; start it with: mlflow server --port {port}, or {remedy}"
        if "403" in text:
            return (
                f"{name}: the MLflow server refuses this address (403); start it with --allowed-hosts naming {host}, "
                f"use an address it knows, or {remedy}"
            )
        return (
            f"{name}: does not answer as an MLflow server does ({text[:160]}); correct MLFLOW_TRACKING_URI, or {remedy}"
        )
    return f"{name}: not usable as a tracking store ({first_line(error)}); correct MLFLOW_TRACKING_URI"


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def without_password(uri: str) -> str:
    head, at, tail = uri.rpartition("@")
    return f"{head.partition('://')[0]}://{tail}" if at and not uri.startswith("sqlite:") else uri
