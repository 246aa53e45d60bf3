"""A process that holds one version of a model and predicts: MLflow's scoring application on a Unix socket.

Its standard input stays open as long as its front lives; its first line is the Job. On standard output it says one
line of JSON: {"ready": true, ...} once a real prediction has been made, or {"error": ...}.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from crism_mlops.errors import CrismError, ServingError, one_line
from crism_mlops.quiet import quiet_libraries
from crism_mlops.registry.serving.logs import log_as_json, tell

if TYPE_CHECKING:
    from crism_mlops.registry.serving.scoring import Scoring

WARM_SIDE = 32
# A header: how long the front still waits for the answer.
SECONDS = "x-crism-seconds"


@dataclass(frozen=True, slots=True)
class Job:
    """`folder`: the version's files, `house`: what is to be removed when the front was killed; `threads`: requests
    at once; `timeout`: seconds a prediction may take."""

    folder: str
    house: str
    socket: str
    threads: int
    timeout: float

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    # What libraries print goes where logs go.
    os.dup2(2, 1)
    log_as_json()
    quiet_libraries()
    job = Job(**json.loads(_first_line()))
    Thread(target=_end_with_front, args=(job.house,), name="front", daemon=True).start()
    try:
        scoring = load(job)
        made = warm_up(scoring)
    except Exception as error:
        expected = isinstance(error, CrismError)
        tell(logging.ERROR, "model does not load", exc_info=None if expected else error, error=one_line(error))
        answers.write(json.dumps({"error": one_line(error)}) + "\n")
        answers.flush()
        os._exit(1)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(job.socket)
    listener.listen(1024)
    answers.write(json.dumps({"ready": True, "batches": scoring.batches, "warmed": made}) + "\n")
    asyncio.run(_serve(scoring, listener, job.threads))


def load(job: Job) -> Scoring:
    """The scoring application of the version whose files lie in the job's folder."""
    # MLflow gives up a request after so long, whatever its environment says.
    os.environ["MLFLOW_SCORING_SERVER_REQUEST_TIMEOUT"] = str(max(1, round(job.timeout)))

    from crism_mlops.registry.serving.scoring import Scoring
    from crism_mlops.registry.trusted import load_checked

    return Scoring(load_checked(Path(job.folder)), job.timeout)


def warm_up(scoring: Scoring) -> bool:
    """Make a real prediction of a small image of the bands that the model names; False where the model does not say
    what it takes. Raises ServingError where the answer is no prediction."""
    import numpy as np

    model = scoring.model
    schema = model.metadata.get_input_schema()
    if schema is None or not schema.is_tensor_spec() or len(schema.inputs) != 1:
        return False
    shape = schema.inputs[0].shape
    if len(shape) != 4 or shape[3] < 1:
        return False
    # Reflectances of dark ground, not the same everywhere: it would be no data, or without contrast.
    ramp = np.linspace(0.1, 0.3, WARM_SIDE * WARM_SIDE * shape[3], dtype=np.float32)
    answer: Any = model.predict(ramp.reshape(1, WARM_SIDE, WARM_SIDE, shape[3]), params=scoring.required)
    prediction = np.asarray(answer["prediction"] if isinstance(answer, dict) else answer)
    if prediction.shape[:3] != (1, WARM_SIDE, WARM_SIDE) or not np.isfinite(prediction).all():
        raise ServingError(f"its first prediction has shape {prediction.shape} or is not finite; promote another")
    return True


async def _serve(scoring: Scoring, listener: socket.socket, threads: int) -> None:
    import uvicorn

    # A thread waits for each request, so that batches can be as large as the front lets requests in.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(threads + 2))
    config = uvicorn.Config(
        scoring, log_config=None, access_log=False, lifespan="off", ws="none", proxy_headers=False,
        # The front's connections stay: closed by this side, one could cost a request.
        timeout_keep_alive=86400, timeout_graceful_shutdown=5,
    )  # fmt: skip
    await uvicorn.Server(config).serve(sockets=[listener])


def _first_line() -> bytes:
    line = bytearray()
    while not line.endswith(b"\n"):
        # Not through sys.stdin: a buffer that a thread reads from cannot be closed at the end of the process.
        block = os.read(0, 1)
        if not block:
            os._exit(1)
        line += block
    return bytes(line)


def _end_with_front(house: str) -> None:
    while os.read(0, 4096):
        pass
    # The front closes its end when it stops us, too; then it tidies up itself, and this does no harm.
    shutil.rmtree(Path(house), ignore_errors=True)
    os._exit(0)


if __name__ == "__main__":
    main()
