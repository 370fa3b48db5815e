"""A loopback TCP proxy that counts bytes and makes faults, for HTTP and for nnsight's websocket.

with Proxy(stack.api) as proxy:                       # nnsight.CONFIG.API.HOST = proxy.url
    proxy.faults = [Fault("cut", "/subscribe", after=200)]
"""

import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass


@dataclass
class Fault:
    kind: str  # "reset" | "hang" | "delay" | "status" | "cut" | "freeze" | "drip"
    path: str = ""  # of requests that start with this; by default of all
    times: int = 1  # how many connections it hits
    seconds: float = 0  # of "delay", before anything is passed on; of "drip", between two bytes
    code: int = 500  # of "status"
    after: int = (
        0  # bytes from the server after which "cut" closes, or "freeze" stops passing on without closing
    )
    skip: int = 0  # matching connections that are left alone first


class Proxy:
    "Counts in `sent` (client to server), `received`, `connections` and by request path in `paths`."

    def __init__(self, port: int):
        self.target, self.faults = ("127.0.0.1", port), []
        self.lock, self.open = threading.Lock(), set()
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.reset_counts()

    def reset_counts(self):
        self.sent = self.received = self.connections = 0
        self.paths = {}

    def counts(self) -> dict:
        return dict(
            sent=self.sent,
            received=self.received,
            connections=self.connections,
            paths={k: tuple(v) for k, v in self.paths.items()},
        )

    def __enter__(self):
        threading.Thread(target=self._accept, args=(self.server,), daemon=True).start()
        return self

    def __exit__(self, *a):
        self.refuse()
        self.cut()

    def refuse(self):
        "From now on connections are refused."
        self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()

    def listen(self):
        self.server = socket.create_server(("127.0.0.1", self.port))
        self.__enter__()

    def cut(self):
        "Close what is open, with a reset."
        with self.lock:
            socks, self.open = self.open, set()
        for s in socks:
            self._reset(s)

    def _reset(self, s):
        with contextlib.suppress(OSError):
            s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            s.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(OSError):
            s.close()

    def _accept(self, server):
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _matching(self, path):
        with self.lock:
            for f in self.faults:
                if not path.startswith(f.path) or f.times <= 0:
                    continue
                if f.skip > 0:
                    f.skip -= 1
                    continue
                f.times -= 1
                return f

    def _serve(self, client):
        with self.lock:
            self.open.add(client)
            self.connections += 1
        try:
            head = client.recv(65536)
        except OSError:
            return
        words = head.split(b"\r\n", 1)[0].split()
        path = words[1].decode().split("?")[0] if len(words) > 1 else ""
        count = self.paths.setdefault(path if path.count("/") < 2 else path.rsplit("/", 1)[0], [0, 0, 0])
        count[0] += 1
        f = self._matching(path)
        if f and f.kind == "reset":
            return self._reset(client)
        if f and f.kind == "hang":
            with contextlib.suppress(OSError):
                while client.recv(65536):
                    pass
            return
        if f and f.kind == "delay":
            time.sleep(f.seconds)
        if f and f.kind == "status":
            body = b'{"detail":"made by the proxy"}'
            self._drain(client, head)
            with contextlib.suppress(OSError):
                client.sendall(
                    b"HTTP/1.1 %d Fault\r\nContent-Type: application/json\r\n" % f.code
                    + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
                    + body
                )
                client.shutdown(socket.SHUT_WR)
            return client.close()
        try:
            server = socket.create_connection(self.target, 10)
        except OSError:
            return self._reset(client)
        server.settimeout(None)
        with self.lock:
            self.open.add(server)
        self._count("sent", count, 1, len(head))
        server.sendall(head)
        threading.Thread(
            target=self._pipe, args=(client, server, "sent", count, 1, None), daemon=True
        ).start()
        self._pipe(
            server, client, "received", count, 2, f if f and f.kind in ("cut", "freeze", "drip") else None
        )

    def _drain(self, client, head):
        "Read the whole request, so that its sender is not reset while it sends."
        size = next(
            (
                int(line.split(b":")[1])
                for line in head.split(b"\r\n\r\n")[0].split(b"\r\n")
                if line.lower().startswith(b"content-length:")
            ),
            0,
        )
        left = size - len(head.split(b"\r\n\r\n", 1)[-1])
        with contextlib.suppress(OSError):
            while left > 0 and (data := client.recv(65536)):
                left -= len(data)

    def _count(self, name, count, k, n):
        with self.lock:
            setattr(self, name, getattr(self, name) + n)
            count[k] += n

    def _pipe(self, a, b, name, count, k, fault):
        total = 0
        try:
            while data := a.recv(65536):
                if fault and fault.kind == "drip":
                    for i in range(len(data)):
                        b.sendall(data[i : i + 1])
                        time.sleep(fault.seconds)
                elif fault and total + len(data) > fault.after:
                    data = data[: max(0, fault.after - total)]
                    if data:
                        b.sendall(data)
                        self._count(name, count, k, len(data))
                    if fault.kind == "cut":
                        self._reset(b)
                        return self._reset(a)
                    while a.recv(65536):
                        pass  # freeze: the line is up, nothing comes
                    return
                total += len(data)
                self._count(name, count, k, len(data))
                if not (fault and fault.kind == "drip"):
                    b.sendall(data)
            with contextlib.suppress(OSError):
                b.shutdown(socket.SHUT_WR)
        except OSError:
            for s in (a, b):
                with contextlib.suppress(OSError):
                    s.close()
