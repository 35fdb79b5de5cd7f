"""An S3-compatible server, and a connection to it that counts requests and can be cut."""

import re
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pyarrow.fs
from moto.server import ThreadedMotoServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Wire:
    """Forward bytes to a server and back.

    Attributes:
        asked: how often a block of an object was requested, by (object, range).
        cuts: how many more connections are cut after 5,000 bytes of an answer.
        is_down: whether connections are refused.
    """

    def __init__(self, port: int) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        self.cuts = 0
        self.cut = 0
        self.is_down = False
        self._server = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.is_down = True
        self._listener.close()

    def shards_asked(self) -> Counter[str]:
        """Return how many bytes of each shard were asked for, in blocks."""
        return Counter(name for name, _ in self.asked.elements() if name.endswith(".arrow"))

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if self.is_down:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self._server))
                threading.Thread(target=self._pass, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, is_request: bool) -> None:
        passed = 0
        with suppress(OSError):
            while (data := source.recv(1 << 16)) and not self.is_down:
                if is_request:
                    self._count(data)
                passed += len(data)
                if not is_request and passed > 5_000 and self.cuts > 0:
                    self.cuts -= 1
                    self.cut += 1
                    break
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _count(self, data: bytes) -> None:
        for request in re.finditer(rb"GET /(\S+) HTTP.*?(?=GET /|\Z)", data, re.DOTALL):
            if span := re.search(rb"\r\nrange: (\S+)", request[0], re.IGNORECASE):
                self.asked[request[1].decode(), span[1].decode()] += 1


@contextmanager
def object_store(bucket: str = "bucket") -> Iterator[tuple[Wire, dict[str, str]]]:
    """Yield the wire to a server with one empty bucket, and the environment with which it is reached."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    direct = pyarrow.fs.S3FileSystem(
        access_key="key",
        secret_key="secret",
        region="us-east-1",
        endpoint_override=f"http://127.0.0.1:{port}",
        allow_bucket_creation=True,
    )
    direct.create_dir(bucket)
    wire = Wire(port)
    try:
        yield wire, {**CREDENTIALS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{wire.port}"}
    finally:
        wire.close()
        server.stop()
