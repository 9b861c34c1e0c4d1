"""What a rater sees, as a Starlette application: consent, pairs, thanks. It works offline and without JavaScript.

    /              what the study is and what it stores; POST begins
    /next          redirects to a pair that the rater has not answered, or to /thanks
    /pair/NUMBER   two pictures and two questions; POST stores the answers
    /go-on/SECRET  a rater's own link: continues where they stopped, on any device
    /picture/NAME  a picture's pixels; its name is random

A random secret in a cookie identifies a rater. No page, address or file says which model drew a picture: templates
receive only prompts, random names and numbers of pairs.
"""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from urllib.parse import parse_qs

from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from lidit.study.store import ANSWERS, Shown, Store, digest

PAGES = Path(__file__).with_name("pages")
A_YEAR = 365 * 24 * 3600  # seconds
LONGEST = 4096  # bytes that a form may have
SMALL = 256  # pixels: a smaller picture is enlarged with its pixels as squares, not blurred
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; script-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Robots-Tag": "noindex",
}
# UNSTATED: the words of the two questions; the paper names them "image quality" and "image-text alignment"
QUESTIONS = {
    "quality": ("Which is the better picture?", "Judge sharpness, composition and faults; ignore the text."),
    "alignment": (
        "Which fits the text better?",
        "Judge whether a picture shows all that the text asks for, and nothing that contradicts it.",
    ),
}
templates = Environment(loader=FileSystemLoader(PAGES), autoescape=True, trim_blocks=True, lstrip_blocks=True)


def application(store: Store, contact: str = "") -> Starlette:
    """The application that serves the pages of a study.

    Args:
        store: the study to serve.
        contact: the person whom raters may ask; empty: nobody is named.
    """
    routes = [
        Route("/", welcome),
        Route("/", agree, methods=["POST"]),
        Route("/next", go_next),
        Route("/pair/{pair}", compare),
        Route("/pair/{pair}", answer, methods=["POST"]),
        Route("/thanks", thanks),
        Route("/go-on/{token}", go_on),
        Route("/leave", leave, methods=["POST"]),
        Route("/picture/{token}", picture),
        Route("/{name}", static),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=secured)],
        exception_handlers={HTTPException: problem, sqlite3.Error: database_failed},
    )
    app.state.store, app.state.contact = store, contact
    app.state.cookie = f"rater-{digest(store.settings['begun'])[:8]}"  # browsers share cookies between ports
    return app


async def secured(request: Request, follow: RequestResponseEndpoint) -> Response:
    """Add headers to every response that keep other sites out and the page's address out of the Referer."""
    response = await follow(request)
    response.headers.update(HEADERS)
    response.headers.setdefault("Cache-Control", "no-store")
    return response


async def welcome(request: Request) -> Response:
    """Show the first page: what the study is."""
    store = _store(request)
    rater = store.rater(_secret(request))
    done, pairs = store.progress(rater or 0)
    return _html("welcome.html", pairs=pairs, done=done, known=rater is not None, contact=request.app.state.contact)


async def agree(request: Request) -> Response:
    """Register a rater who has agreed."""
    if (await _form(request)).get("agree") != "yes":
        raise HTTPException(400, "Please tick the box if you agree; the study cannot begin without your consent.")
    return _known(request, _store(request).begin())


async def go_on(request: Request) -> Response:
    """Recognise a rater by their own link, and continue."""
    token = request.path_params["token"]
    if _store(request).rater(token) is None:
        raise HTTPException(404, "This link is incomplete, or belongs to another study.")
    return _known(request, token)


async def leave(request: Request) -> Response:
    """Forget the rater, so that another person can use the same device."""
    response = RedirectResponse("/", 303)
    response.delete_cookie(request.app.state.cookie)
    return response


async def go_next(request: Request) -> Response:
    """Redirect to a pair that the rater has not answered yet."""
    pair = _store(request).next_pair(_rater(request))
    return RedirectResponse("/thanks" if pair is None else f"/pair/{pair}", 303)


async def compare(request: Request) -> Response:
    """Show a pair, with the answer that the rater gave to it before."""
    store, rater, pair = _store(request), _rater(request), _pair(request)
    prompt, left, right = _sides(request)
    done, pairs = store.progress(rater)
    return _html(
        "compare.html",
        prompt=prompt,
        sides={"left": left, "right": right},
        small=max(left.width, left.height, right.width, right.height) < SMALL,
        questions=QUESTIONS,
        chosen=store.answer(rater, pair),
        done=done,
        pairs=pairs,
        previous=store.previous(rater, pair),
        link=_link(request),
    )


async def answer(request: Request) -> Response:
    """Store an answer, then redirect to the next pair."""
    rater, pair = _rater(request), _pair(request)
    _, left, _ = _sides(request)
    chosen = await _form(request)
    if any(chosen.get(question) not in ANSWERS for question in QUESTIONS):
        raise HTTPException(400, "Please answer both questions; “no difference” is an answer.")
    _store(request).vote(rater, pair, left.id, chosen["quality"], chosen["alignment"])
    return RedirectResponse("/next", 303)


async def thanks(request: Request) -> Response:
    """Show the last page: the rater has answered all pairs, or stops for now."""
    store, rater = _store(request), _rater(request)
    done, pairs = store.progress(rater)
    return _html("thanks.html", done=done, pairs=pairs, previous=store.previous(rater), link=_link(request))


async def picture(request: Request) -> Response:
    """Send a picture's pixels."""
    path = _store(request).picture(request.path_params["token"])
    if path is None:
        raise HTTPException(404, "There is no such picture.")
    return Response(path.read_bytes(), media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})


async def static(request: Request) -> Response:
    """Send the style sheet, the script or the icon."""
    kinds = {"study.css": "text/css", "study.js": "text/javascript", "icon.svg": "image/svg+xml"}
    name = request.path_params["name"]
    if name not in kinds:
        raise HTTPException(404, "There is no such page.")
    return Response((PAGES / name).read_bytes(), media_type=kinds[name])


async def problem(request: Request, error: Exception) -> Response:
    """Say what went wrong, with a link to the first page."""
    assert isinstance(error, HTTPException)
    response = _html("problem.html", message=error.detail)
    response.status_code = error.status_code
    return response


async def database_failed(request: Request, error: Exception) -> Response:
    """Say that the database could not be read or written; what was stored before is not lost."""
    print(f"lidit: the study's database does not answer: {error}", file=sys.stderr, flush=True)
    message = "What you sent could not be saved. Go back and send it again; if that fails, tell the study's organiser."
    return await problem(request, HTTPException(503, message))


def _store(request: Request) -> Store:
    return request.app.state.store


def _secret(request: Request) -> str:
    """The secret in the browser's cookie; empty: there is none."""
    return request.cookies.get(request.app.state.cookie, "")


def _rater(request: Request) -> int:
    """The number of the rater who sent the request."""
    rater = _store(request).rater(_secret(request))
    if rater is None:
        raise HTTPException(403, "This browser is not known here: open your own link, or begin on the first page.")
    return rater


def _pair(request: Request) -> int:
    """The number of the pair in the address."""
    number = request.path_params["pair"]
    if not number.isdecimal() or len(number) > 9:  # SQLite and int() cannot read numbers of any length
        raise HTTPException(404, "There is no such pair.")
    return int(number)


def _sides(request: Request) -> tuple[str, Shown, Shown]:
    """Prompt, left and right picture of the pair in the address."""
    found = _store(request).sides(_rater(request), _pair(request))
    if found is None:
        raise HTTPException(404, "There is no such pair.")
    return found


async def _form(request: Request) -> dict[str, str]:
    """The fields of a form; of fields with the same name, the last."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST:
            raise HTTPException(413, "That is too long for an answer.")
    return {name: values[-1] for name, values in parse_qs(body.decode(errors="replace")).items()}


def _known(request: Request, token: str) -> Response:
    """Redirect to the next pair, and set the cookie by which the rater is recognised from now on."""
    response = RedirectResponse("/next", 303)
    secure = request.url.scheme == "https"
    response.set_cookie(request.app.state.cookie, token, max_age=A_YEAR, httponly=True, samesite="lax", secure=secure)
    return response


def _link(request: Request) -> str:
    """The rater's own link, which continues on any device."""
    return str(request.url_for("go_on", token=_secret(request)))


def _html(template: str, **values: object) -> HTMLResponse:
    return HTMLResponse(templates.get_template(template).render(values))
