"""optuna-dashboard for each served run, read only, under ``/study/RUN/``.

optuna-dashboard is a WSGI application that expects the root of a host: its script and its page name absolute paths.
They are rewritten to work out the prefix in the browser, which is right under any route prefix, proxy or tunnel. Where
an unknown version of it cannot be rewritten, the page says how to run it by hand.
"""

import hashlib
import hmac
import html
import io
import logging
import re
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata, resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from optuna_dashboard import wsgi

from bruno_ray.errors import BrunoError, StudyError
from bruno_ray.runs.directory import RunDirectory
from bruno_ray.study.storage import open_storage
from serve.pages.read_only_storage import OneStudy

logger = logging.getLogger(__name__)

PATH = "/study"
COOKIE = "bruno-ray-study"
COOKIE_SECONDS = 12 * 3600

# What the dashboard's script says -> what it has to say. Each must be there exactly that often.
PREFIX = 'location.pathname.replace(/\\/dashboard(\\/.*)?$/,"")'
REWRITES = (
    ('url_prefix:"/dashboard"', f'url_prefix:{PREFIX}+"/dashboard"', 1),
    ('(null!=e?e:"")}handleResponse', f"({PREFIX})}}handleResponse", 1),
    ("`/csv/", f"`${{{PREFIX}}}/csv/", 2),
)

LOGIN = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>bruno-ray</title><link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width"><style>:root {{ color-scheme: light dark }}
body {{ font-family: system-ui, sans-serif; margin: 4rem auto; max-width: 24rem; padding: 0 1rem }}</style>
<form method="post" action="{action}"><p>{message}</p>
<input type="password" name="key" autofocus autocomplete="off"> <button>Open</button></form></html>"""


def page_of(run: str) -> str:
    """The part of the URL that stands for a run, whose name may hold slashes and spaces."""
    return re.sub(r"[^\w.-]", "-", run, flags=re.ASCII)


class Cookies:
    """Signed, expiring proofs that a browser has shown the key. They hold no part of it."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def _signature(self, until: str) -> str:
        return hmac.new(self._secret, until.encode(), hashlib.sha256).hexdigest()

    def issue(self) -> str:
        until = str(int(time.time()) + COOKIE_SECONDS)
        return f"{until}.{self._signature(until)}"

    def valid(self, cookie: str | None) -> bool:
        until, _, signature = (cookie or "").partition(".")
        genuine = hmac.compare_digest(signature.encode(), self._signature(until).encode())
        return genuine and int(until) > time.time()


def rewritten_bundle() -> bytes:
    """The dashboard's script with its paths made relative. Raises StudyError if this version is not the one we know."""
    script = resources.files("optuna_dashboard").joinpath("public/bundle.js").read_text()
    for old, new, times in REWRITES:
        if script.count(old) != times:
            version = metadata.version("optuna-dashboard")
            raise StudyError(f"optuna-dashboard {version} cannot be shown here: install one that is known to work")
        script = script.replace(old, new)
    return script.encode()


class StudyPages:
    """The dashboards, made when they are first looked at."""

    def __init__(self, runs: Mapping[str, Path], bundle: bytes):
        self._runs = {page_of(name): path for name, path in runs.items()}
        self._bundle = bundle
        self._dashboards: dict[str, tuple[int, Callable]] = {}
        # Importances and plots are computed in Python: not many at once beside the streams of this process.
        self._threads = CapacityLimiter(2)

    def _dashboard(self, run: str) -> tuple[int, Callable]:
        """Id of the run's study, and its WSGI application."""
        if run not in self._dashboards:
            settings = RunDirectory(self._runs[run]).read().settings
            storage = open_storage(settings.study.storage, self._runs[run], read_only=True)
            study = OneStudy(storage, settings.study.name, settings.scoring.objectives)
            self._dashboards[run] = study.study_id, wsgi(study)
        return self._dashboards[run]

    async def answer(self, run: str, path: str, query: str) -> Response:
        """Answer to ``GET path`` of the dashboard of ``run``; no path leads to the study."""
        if run not in self._runs:
            return HTMLResponse(f"There is no run {html.escape(run)}.", 404)
        if path == "static/bundle.js":
            return Response(self._bundle, media_type="text/javascript", headers={"Cache-Control": "max-age=3600"})
        try:
            if not path:
                study_id, _ = await to_thread.run_sync(self._dashboard, run, limiter=self._threads)
                return Response(status_code=307, headers={"Location": f"dashboard/studies/{study_id}"})
            status, headers, body = await to_thread.run_sync(self._call, run, path, query, limiter=self._threads)
        except BrunoError as error:
            return HTMLResponse(html.escape(str(error)), 503)
        if path == "dashboard" or path.startswith("dashboard/"):
            up = "../" * path.count("/")
            body = body.replace(b'src="/static/', f'src="{up}static/'.encode())
            body = body.replace(b"<head>", b'<head><link rel="icon" href="data:,">')
        kept = {"content-type", "content-disposition", "content-security-policy"}
        return Response(body, status, {name: value for name, value in headers if name.lower() in kept})

    def _call(self, run: str, path: str, query: str) -> tuple[int, list[tuple[str, str]], bytes]:
        """One WSGI request, always a GET without a body."""
        environ: dict[str, Any] = {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": "/" + path,
            "QUERY_STRING": query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "HTTP_ACCEPT_ENCODING": "identity",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        started: list[Any] = []
        _, dashboard = self._dashboard(run)
        parts = dashboard(environ, lambda status, headers, exc_info=None: started.extend((status, headers)))
        try:
            return int(started[0].split()[0]), started[1], b"".join(parts)
        finally:
            if hasattr(parts, "close"):
                parts.close()


def _ask_for_key(login: str, run: str, message: str) -> Response:
    return HTMLResponse(LOGIN.format(action=f"{login}?run={quote(run)}", message=message), 401)


def mount(app: FastAPI, runs: Mapping[str, Path], accepts: Callable[[str], bool] | None) -> None:
    """Add ``/study/RUN/`` for every run. To be called in the ingress' builder, before Serve wraps the application.

    A link carries no Authorization header, so these pages look after themselves: the key is given once, to
    ``POST /study/login``, for a cookie that only scripts of the server can see. A middleware of ``app`` that asks for
    the key must let ``/study`` through.

    Args:
        runs: name -> run directory. The page of a run is under `page_of` its name.
        accepts: whether a key is good; None when no key is asked for.
    """
    cookies = Cookies()
    try:
        pages, problem = StudyPages(runs, rewritten_bundle()), None
    except StudyError as error:
        logger.warning("%s", error)
        pages, problem = None, str(error)

    @app.post(PATH + "/login", include_in_schema=False)
    async def login(request: Request) -> Response:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        from_form = scheme.lower() != "bearer"
        if from_form:
            body = b""
            async for part in request.stream():
                body += part
                if len(body) > 4096:
                    return Response(status_code=413)
            key = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0]
        run = request.query_params.get("run", "")
        if accepts is not None and not accepts(key):
            return _ask_for_key("login", run, "That is not the key.")
        # Relative to /study/login: the study that was asked for.
        response = RedirectResponse(f"{quote(run)}/" if run else "../chat/", 303) if from_form else Response()
        https = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
        response.set_cookie(
            COOKIE,
            cookies.issue(),
            max_age=COOKIE_SECONDS,
            path=None,  # then the browser takes the folder this came from, whatever the prefix
            httponly=True,
            samesite="strict",
            secure=https,
        )
        return response

    @app.get(PATH + "/{run}", include_in_schema=False)
    async def without_slash(run: str) -> Response:
        return Response(status_code=307, headers={"Location": f"{run}/"})

    @app.get(PATH + "/{run}/{path:path}", include_in_schema=False)
    async def study(request: Request, run: str, path: str) -> Response:
        if accepts is not None and not cookies.valid(request.cookies.get(COOKIE)):
            if path:
                return Response("Open the study's page first: it asks for the key.", 401)
            return _ask_for_key("../login", run, "The server's key:")
        if pages is None:
            return HTMLResponse(f"{html.escape(str(problem))}. By hand: optuna-dashboard RUN/study.journal", 503)
        return await pages.answer(run, path, request.url.query)
