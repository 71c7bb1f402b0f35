"""The model server's HTTP: plates in, probabilities out. It follows the signed pointer of a site folder."""

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

from deploy.errors import BadBody, NoAnswer, NoPointer
from deploy.server.metrics import Metrics
from deploy.server.request_body import EXPECTED, MAX_BODY, read_plates
from deploy.server.slots import CANT_NOW, REFUSALS, Held, Slots, Swap

POLL_S = 1.0  # seconds between two checks of the pointer's mtime
RETRY_S = 30.0  # seconds between two tries of a refused pointer while no bundle is in service
WORKERS = 2  # one thread computes while the other writes an answer
MAX_WAITING = 32  # requests held at once: bounds memory to 32 bodies
log = logging.getLogger("deploy")


class ModelServer:
    """The HTTP side of one site's Slots; each public method but `app` is a handler: request -> response.

    `on_up` runs when the first load has ended; `on_tick` runs each POLL_S.
    """

    def __init__(
        self, slots: Slots, on_tick: Callable[[], None] = lambda: None, on_up: Callable[[], None] = lambda: None
    ):
        self.slots, self.on_tick, self.on_up = slots, on_tick, on_up
        self.counts = Metrics()
        self.waiting = 0
        self.scoring = ThreadPoolExecutor(WORKERS, thread_name_prefix="predict")
        self.changing = ThreadPoolExecutor(4, thread_name_prefix="load")  # a rollback never queues behind a load
        slots.on_swap = self._swapped

    def app(self) -> Starlette:
        """Return the ASGI application; its lifespan follows the pointer."""
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
        self.counts.requests.labels(str(answer.status_code)).inc()
        return answer

    async def _predict(self, request: Request) -> Response:
        held = self.slots.current
        if held is None:
            return self._no(503, self._why_not())
        if self.waiting >= MAX_WAITING:
            return self._no(503, f"busy: {self.waiting} requests are waiting; retry")
        started = time.perf_counter()
        self.waiting += 1
        try:
            plates = read_plates(await read_body(request))
            # use the bundle in service now that the body is complete, even if a swap comes during the run
            held = self.slots.current or held
            answer = await asyncio.get_running_loop().run_in_executor(self.scoring, held.session.predict, plates)
        except BadBody as wrong:
            return self._no(wrong.status, str(wrong))
        except NoAnswer as wrong:
            log.error("%s", wrong)
            return self._no(500, str(wrong))
        except ClientDisconnect:
            return self._no(400, "the client disconnected before its body was complete")
        finally:
            self.waiting -= 1
        self.counts.images.labels(held.id).inc(len(plates))
        self.counts.seconds.observe(time.perf_counter() - started)
        findings = list(held.session.bundle.findings)
        document = {"bundle": held.id, "findings": findings, "probabilities": answer.probabilities.tolist()}
        if request.query_params.get("heatmaps") == "1":
            maps = answer.heatmap.astype("<f4")
            document["heatmaps"] = {"shape": maps.shape, "float32": base64.b64encode(maps.tobytes()).decode()}
        return JSONResponse(document)

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
        return Response(self.counts.text(), media_type="text/plain; version=0.0.4")

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
        requested_at = time.time()
        swap = await self._change(self.slots.reload)
        if isinstance(swap, Response):
            return swap
        return JSONResponse(
            {
                "bundle": swap.bundle,
                "previous": swap.previous,
                "swap_seconds": swap.seconds,
                "prepared": swap.prepared,
                "changed": swap.at >= requested_at,
            }
        )

    async def _change(self, act: Callable, *arguments):
        """Return the result of `act`, or a response: 409 refused, 503 the machine can't. The bundle in service stays."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self.changing, act, *arguments)
        except REFUSALS as reason:
            self.counts.refusals.inc()
            log.error("refused: %s", reason)
            return self._no(503 if isinstance(reason, CANT_NOW) else 409, str(reason))

    def _no(self, status: int, error: str) -> JSONResponse:
        held = self.slots.current
        return JSONResponse({"error": error, "bundle": held.id if held else None}, status)

    def _why_not(self) -> str:
        return self.slots.refused or "loading the first model"

    def _swapped(self, swap: Swap, held: Held) -> None:
        self.counts.swapped(swap.bundle, held.session.provider, swap.seconds, swap.previous is None)

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        watching = asyncio.create_task(self._watch())
        yield
        watching.cancel()
        self.scoring.shutdown(wait=False, cancel_futures=True)
        self.changing.shutdown(wait=False, cancel_futures=True)

    async def _watch(self) -> None:
        """Load the pointer's bundle, call `on_up`, then follow the pointer each second."""
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
        except NoPointer:
            pass  # a new site; /readyz gives the reason
        except REFUSALS as reason:
            if str(reason) != before:  # log a reason once, not at every try
                self.counts.refusals.inc()
                log.error("refused: %s", reason)
        except Exception:  # the loop of this process; the bundle in service keeps serving
            log.exception("the pointer could not be followed")


async def read_body(request: Request) -> bytes:
    """Return the whole body; BadBody (413) as soon as its length exceeds MAX_BODY."""
    limit = f"body over {MAX_BODY} bytes; {EXPECTED}"
    if int(request.headers.get("content-length", "0")) > MAX_BODY:
        raise BadBody(limit, 413)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise BadBody(limit, 413)
    return bytes(body)
