"""The inference server's HTTP: plates in, probabilities out; it follows the signed pointer of a site folder.

Refuses to know the ledger, DICOM, and why a bundle was put in service.
"""

import asyncio
import base64
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from deploy.server.metrics import Meters
from deploy.server.request_body import EXPECTED, MAX_BODY, BadBody, read_plates
from deploy.server.runtime import NoAnswer
from deploy.server.slots import CANT_NOW, REFUSALS, Held, NothingPointed, Slots, Swap

POLL_S = 1.0  # how often the pointer's mtime is looked at
RETRY_S = 30.0  # how often a refused pointer is tried again while nothing is in service
WORKERS = 2  # one run computes while the next one's answer is written
MAX_WAITING = 32  # requests held at once: bounds memory to 32 bodies
log = logging.getLogger("deploy")


class Infer:
    """The HTTP side of one site's Slots; each method is a handler: request -> answer."""

    def __init__(
        self, slots: Slots, on_tick: Callable[[], None] = lambda: None, on_up: Callable[[], None] = lambda: None
    ):
        self.slots, self.on_tick, self.on_up = slots, on_tick, on_up
        self.meters = Meters()
        self.waiting = 0
        self.scoring = ThreadPoolExecutor(WORKERS, thread_name_prefix="predict")
        self.changing = ThreadPoolExecutor(4, thread_name_prefix="load")  # a rollback never queues behind a load
        slots.on_swap = self._swapped

    def app(self) -> Starlette:
        """The ASGI application; its lifespan runs the pointer watch."""
        routes = [
            Route("/predict", self.predict, methods=["POST"]),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.metrics),
            Route("/prepare", self.prepare, methods=["POST"]),
            Route("/reload", self.reload, methods=["POST"]),
        ]
        return Starlette(routes=routes, lifespan=self._life)

    async def predict(self, request: Request) -> Response:
        answer = await self._predict(request)
        self.meters.requests.labels(str(answer.status_code)).inc()
        return answer

    async def _predict(self, request: Request) -> Response:
        held = self.slots.current
        if held is None:
            return self._no(503, self._why_not())
        if self.waiting >= MAX_WAITING:
            return self._no(503, f"busy: {self.waiting} requests are waiting; ask again")
        started = time.perf_counter()
        self.waiting += 1
        try:
            plates = read_plates(await read_body(request))
            # the bundle in service when the body was complete answers, also if another one comes in meanwhile
            held = self.slots.current or held
            answer = await asyncio.get_running_loop().run_in_executor(self.scoring, held.session.predict, plates)
        except BadBody as wrong:
            return self._no(400, str(wrong))
        except TooLong as wrong:
            return self._no(413, str(wrong))
        except NoAnswer as wrong:
            log.error("%s", wrong)
            return self._no(500, str(wrong))
        except ClientDisconnect:
            return self._no(400, "the client left before its body was complete")
        finally:
            self.waiting -= 1
        self.meters.images.labels(held.id).inc(len(plates))
        self.meters.seconds.observe(time.perf_counter() - started)
        findings = list(held.session.bundle.findings)
        said = {"bundle": held.id, "findings": findings, "probabilities": answer.probabilities.tolist()}
        if request.query_params.get("heatmaps") == "1":
            maps = answer.heatmap.astype("<f4")
            said["heatmaps"] = {"shape": maps.shape, "float32": base64.b64encode(maps.tobytes()).decode()}
        return JSONResponse(said)

    async def healthz(self, request: Request) -> Response:
        return JSONResponse({"ok": True})

    async def readyz(self, request: Request) -> Response:
        slots, held = self.slots, self.slots.current
        beside = {
            "previous": slots.previous.id if slots.previous else None,
            "standby": slots.standby.id if slots.standby else None,
            "refused": slots.refused,
        }
        if held is None or slots.last_swap is None:
            return JSONResponse({"ready": False, "bundle": None, "error": self._why_not(), **beside}, 503)
        since = datetime.fromtimestamp(slots.last_swap.at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        state = {"ready": True, "bundle": held.id, "provider": held.session.provider, "since": since}
        return JSONResponse({**state, "findings": held.session.bundle.findings, "probe": held.probe, **beside})

    async def metrics(self, request: Request) -> Response:
        return Response(self.meters.text(), media_type="text/plain; version=0.0.4")

    async def prepare(self, request: Request) -> Response:
        try:
            bundle = (await request.json())["bundle"]
        except (ValueError, KeyError, TypeError):
            return self._no(400, 'expected {"bundle": id}')
        started = time.perf_counter()
        held = await self._change(self.slots.prepare, str(bundle))
        if isinstance(held, Response):
            return held
        return JSONResponse(
            {
                "bundle": held.id,
                "provider": held.session.provider,
                "probe": held.probe,
                "seconds": time.perf_counter() - started,
            }
        )

    async def reload(self, request: Request) -> Response:
        asked = time.time()
        swap = await self._change(self.slots.reload)
        if isinstance(swap, Response):
            return swap
        return JSONResponse(
            {
                "bundle": swap.bundle,
                "previous": swap.previous,
                "swap_seconds": swap.seconds,
                "prepared": swap.prepared,
                "changed": swap.at >= asked,
            }
        )

    async def _change(self, act: Callable, *arguments):
        """The act's result, or why not: 409 refused, 503 this machine can't now; what is in service stays."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.changing, act, *arguments)
        except (*REFUSALS, NothingPointed) as reason:
            self.meters.refusals.inc()
            log.error("refused: %s", reason)
            return self._no(503 if isinstance(reason, CANT_NOW) else 409, str(reason))

    def _no(self, status: int, error: str) -> JSONResponse:
        held = self.slots.current
        return JSONResponse({"error": error, "bundle": held.id if held else None}, status)

    def _why_not(self) -> str:
        return self.slots.refused or "loading the first model"

    def _swapped(self, swap: Swap, held: Held) -> None:
        self.meters.swapped(swap.bundle, held.session.provider, swap.seconds, swap.previous is None)

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        yield
        watching.cancel()
        self.scoring.shutdown(wait=False, cancel_futures=True)
        self.changing.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        """Load what the pointer names, say that we are up, then follow the pointer each second."""
        await self._follow(self.slots.reload)
        self.on_up()
        tried = time.monotonic()
        while True:
            await asyncio.sleep(POLL_S)
            self.on_tick()
            again = self.slots.current is None and time.monotonic() - tried > RETRY_S
            if again:
                tried = time.monotonic()
            await self._follow(self.slots.reload if again else self.slots.follow)

    async def _follow(self, act: Callable) -> None:
        before = self.slots.refused
        try:
            await asyncio.get_running_loop().run_in_executor(self.changing, act)
        except NothingPointed:
            pass  # a new site: /readyz says so
        except REFUSALS as reason:
            if str(reason) != before:  # said once, not at every try
                self.meters.refusals.inc()
                log.error("refused: %s", reason)
        except Exception:  # the one loop of this process: what is in service goes on serving
            log.exception("the pointer could not be followed")


class TooLong(Exception):
    """A body over MAX_BODY."""


async def read_body(request: Request) -> bytes:
    """The whole body; TooLong as soon as it is known to be."""
    limit = f"body over {MAX_BODY} bytes; {EXPECTED}"
    if int(request.headers.get("content-length", "0")) > MAX_BODY:
        raise TooLong(limit)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise TooLong(limit)
    return bytes(body)
