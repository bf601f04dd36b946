"""Local emulators of Google Cloud Storage and S3, for the tests of ``gs://`` and ``s3://``."""

from __future__ import annotations

import contextlib
import http.server
import logging
import socket
from collections.abc import Iterator
from unittest import mock

BUCKET = "bucket"


@contextlib.contextmanager
def google(environment: dict[str, str]) -> Iterator[None]:
    """Fills in the environment that leads gcsfs and tensorstore to the emulator."""
    from gcp_storage_emulator import server
    from gcp_storage_emulator.handlers import objects

    logging.getLogger("gcp_storage_emulator").setLevel(logging.ERROR)

    # tensorstore wants to be told an object's generation with its content, as Google does.
    def download(request, response, storage, *args, **kwargs):
        plain_download(request, response, storage, *args, **kwargs)
        with contextlib.suppress(Exception):
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["X-Goog-Generation"] = found["generation"]

    plain_download = objects.download
    with mock.patch.object(objects, "download", download):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
        with mock.patch.object(http.server, "HTTPServer", _Server):
            running.start()
        address = f"http://127.0.0.1:{port}"
        environment |= {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google what kind of bucket it is
        }
        try:
            yield
        finally:
            running.stop()


class _Server(http.server.ThreadingHTTPServer):
    """Answers several requests at once, and does not mind a client that has read enough."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextlib.contextmanager
def amazon(environment: dict[str, str]) -> Iterator[None]:
    """Fills in the environment that leads s3fs and tensorstore to the emulator."""
    import urllib.request

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    running = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    address = f"http://{host}:{port}"
    environment |= {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    try:
        urllib.request.urlopen(urllib.request.Request(f"{address}/{BUCKET}", method="PUT")).read()
        yield
    finally:
        running.stop()
