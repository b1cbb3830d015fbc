"""A real S3 server on loopback, moto's, that fails on demand as S3 does. Run as a program it is the server.

What is conditional is atomic at S3; moto looks and puts in two steps, so one request is handled at a time.
"""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

BUCKET = "results"
ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_REGION": "us-east-1"}


class Server:
    """The server's process, from the test's side."""

    def __init__(self) -> None:
        # It ends with its standard input: also where this process is killed.
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | ENVIRONMENT,
        )
        assert self._process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        assert self._process.stdout is not None
        self._process.stdout.close()

    @contextlib.contextmanager
    def failing(self, *rules: dict[str, Any]) -> Iterator[None]:
        """While it lasts, requests whose line matches a rule's pattern, `PUT /results/a/manifests`, go wrong.

        `kind`: refused (`status`, `code`; without a request to moto), lost (carried out, then the connection breaks),
        slow (`seconds`), truncated (half of the content), hidden (listings leave out keys that match `key`).
        `times`: how often, at most; `every`: each so many-th of them; always where it says neither. `token`: only those
        with this session token.
        """
        self._tell(rules)
        try:
            yield
        finally:
            self._tell(())

    def requests(self) -> list[str]:
        """The lines of all requests since this was last asked."""
        with urllib.request.urlopen(f"{self.url}/_requests") as reply:
            return json.load(reply)

    def token(self) -> str:
        """The session token of the credentials that the server gave last."""
        with urllib.request.urlopen(f"{self.url}/_token") as reply:
            return reply.read().decode()

    def _tell(self, rules: tuple[dict[str, Any], ...]) -> None:
        request = urllib.request.Request(f"{self.url}/_rules", json.dumps(rules).encode(), method="POST")
        urllib.request.urlopen(request).close()


Start = Callable[..., Any]


class _Failing:
    """moto's application, with what was asked for in front of it."""

    def __init__(self, application: Callable[[dict[str, Any], Start], Any]) -> None:
        self.application = application
        self.alone = threading.Lock()
        self.rules: list[dict[str, Any]] = []
        self.lines: list[str] = []
        self.given = 0  # credentials

    def __call__(self, environ: dict[str, Any], start: Start) -> Any:
        if environ["PATH_INFO"] == "/_rules":
            self.rules = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            start("204 No Content", [])
            return []
        if environ["PATH_INFO"] == "/_requests":
            lines, self.lines = self.lines, []
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(lines).encode()]
        query = environ.get("QUERY_STRING")
        line = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}" + (f"?{query}" if query else "")
        if environ["PATH_INFO"] == "/_token":
            start("200 OK", [])
            return [_credentials(self.given)["Token"].encode()]
        if environ["PATH_INFO"] == "/_credentials":
            self.given += 1
            start("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(_credentials(self.given)).encode()]
        rule = self._rule(line, environ.get("HTTP_X_AMZ_SECURITY_TOKEN", "")) or {"kind": "none"}
        self.lines.append(line)
        if rule["kind"] == "slow":
            time.sleep(rule["seconds"])
        if rule["kind"] == "refused":
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{rule['status']} Refused", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{rule['code']}</Code><Message>As the test asked.</Message></Error>".encode()]
        told: list[Any] = []
        with self.alone:
            body = b"".join(self.application(environ, lambda *said: told.append(said)))
        status, headers, *_ = told[0]
        if rule["kind"] == "lost":
            return self._cut_short(environ, b"")
        if rule["kind"] == "truncated":
            start(status, headers)  # they go on saying how much it is
            return self._cut_short(environ, body[: len(body) // 2])
        if rule["kind"] == "hidden":
            entries = re.compile(r"<Contents>.*?</Contents>", re.DOTALL)
            text = entries.sub(lambda each: "" if re.search(rule["key"], each[0]) else each[0], body.decode())
            body = text.encode()
            headers = [(name, value) for name, value in headers if name.lower() != "content-length"]
        start(status, headers)
        return [body]

    def _cut_short(self, environ: dict[str, Any], body: bytes) -> Iterator[bytes]:
        """Say so much and hang up."""
        if body:
            yield body
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        raise ConnectionAbortedError

    def _rule(self, line: str, token: str) -> dict[str, Any] | None:
        with self.alone:
            for rule in self.rules:
                if not re.search(rule["match"], line) or rule.get("token", token) != token:
                    continue
                rule["met"] = rule.get("met", 0) + 1
                if rule["met"] <= rule.get("times", rule["met"]) and rule["met"] % rule.get("every", 1) == 0:
                    return rule
        return None


def _credentials(number: int) -> dict[str, str]:
    """Of a role, good for an hour, as a container is given them."""
    until = datetime.now(UTC) + timedelta(hours=1)
    return {
        "AccessKeyId": "testing",
        "SecretAccessKey": "testing",
        "Token": f"token{number}",
        "Expiration": until.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _serve() -> None:
    import logging

    import boto3
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    application = DomainDispatcherApplication(create_backend_app)
    server = make_server("127.0.0.1", 0, _Failing(application), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{server.server_port}")
    client.create_bucket(Bucket=BUCKET)
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    sys.path.remove(str(Path(__file__).parent))  # the tests' names are not the server's
    _serve()
