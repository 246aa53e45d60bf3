"""Trials a second of the search alone, by workers and database: this project's engine beside plain Optuna.

`python benchmarks/scale.py [--trials 200] [--workers 1 2 4 8 16 32] [--out FILE.json]`: trials that do nothing (three
parameters, no training, no MLflow) in processes of their own, on SQLite, PostgreSQL, and PostgreSQL behind the
gRPC proxy, one after the other in alternation. PostgreSQL is started here, in a folder of its own.

Plain Optuna: `ask`, three `suggest_float`, `tell`, until the study counts enough finished trials, as its
MaxTrialsCallback does. Ours: what the engine does of it for a trial (`Ledger.claim`, a sampler of the trial's own,
`suggest`, the notes on its attempt, `tell`, `free`), with a beating heart. Time in storage is the time in these
calls; the processes share two cores, so that is waiting for a core as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
import warnings
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from optuna.trial import TrialState

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "integration"))

KEYS = ("x", "y", "z")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--stores", nargs="+", default=["sqlite", "postgresql", "proxy"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    from servers import postgres_server

    from crism_mlops.studies.proxy import serve
    from crism_mlops.studies.storage import open_store

    rows: list[dict[str, Any]] = []
    print("| store | workers | engine | trials | trials/s | ms in storage a trial | errors |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder, postgres_server(Path(folder)) as postgres:
        urls = {"sqlite": f"sqlite:///{folder}/optuna.db", "postgresql": postgres.url}
        server = None
        if "proxy" in options.stores:
            behind = open_store(postgres.url, 0.0)
            server, urls["proxy"] = _proxy(serve, behind)
        for store in options.stores:
            open_store(urls[store], 0.0)
            for count in options.workers:
                for engine in ("plain Optuna", "crism-mlops"):
                    row = measure(store, urls[store], engine, count, options.trials)
                    rows.append(row)
                    cells = (store, count, engine, row["trials"], f"{row['rate']:.1f}", f"{row['storage_ms']:.1f}")
                    print("| " + " | ".join(map(str, (*cells, row["errors"]))) + " |", flush=True)
        if server is not None:
            server.stop(0)
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=2))


def _proxy(serve: Any, behind: Any) -> tuple[Any, str]:
    from servers import free_port

    port = free_port()
    return serve(behind.storage, behind.ledger, "127.0.0.1", port), f"grpc://127.0.0.1:{port}"


def measure(store: str, url: str, engine: str, count: int, trials: int) -> dict[str, Any]:
    """One cell: so many processes, that begin together, until the study has its trials."""
    from crism_mlops.studies.storage import open_store

    name = f"{engine.replace(' ', '-')}-{count}-{time.time_ns()}"
    opened = open_store(url, 0.0)
    study = optuna.create_study(study_name=name, storage=opened.storage)
    context = get_context("spawn")
    barrier, answers = context.Barrier(count + 1), context.Queue()
    processes = [
        context.Process(target=worker, args=(engine, url, name, trials, barrier, answers)) for _ in range(count)
    ]
    for process in processes:
        process.start()
    barrier.wait(timeout=300)
    told = [answers.get(timeout=600) for _ in processes]
    seconds = max(one["ended"] for one in told) - min(one["began"] for one in told)
    for process in processes:
        process.join()
    done = sum(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False))
    return {
        "store": store, "workers": count, "engine": engine, "trials": done, "asked": trials, "rate": done / seconds,
        "storage_ms": 1000.0 * sum(one["storage"] for one in told) / max(done, 1),
        "errors": sum(one["errors"] for one in told), "first_error": next((o["error"] for o in told if o["error"]), ""),
    }  # fmt: skip


def worker(engine: str, url: str, name: str, trials: int, barrier: Any, answers: Any) -> None:
    """One process of a cell."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run = ours if engine == "crism-mlops" else plain
    answers.put(run(url, name, trials, barrier))


def plain(url: str, name: str, trials: int, barrier: Any) -> dict[str, Any]:
    """Optuna as its documentation has it for several processes, SQLite with a patient timeout."""
    if url.startswith("grpc://"):
        host, port = url.removeprefix("grpc://").split(":")
        storage: Any = optuna.storages.GrpcStorageProxy(host=host, port=int(port))
    else:
        wait = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {}
        storage = optuna.storages.RDBStorage(url, engine_kwargs=wait)
    study = optuna.load_study(study_name=name, storage=storage, sampler=RandomSampler())
    barrier.wait(timeout=300)
    began, spent, errors, error = time.perf_counter(), 0.0, 0, ""
    while True:
        at = time.perf_counter()
        try:
            if sum(t.state == TrialState.COMPLETE for t in study.get_trials(deepcopy=False)) >= trials:
                break
            trial = study.ask()
            value = sum(trial.suggest_float(key, 0.0, 1.0) for key in KEYS)
            study.tell(trial, value)
        except Exception:
            errors, error = errors + 1, error or traceback.format_exc(limit=3)
        spent += time.perf_counter() - at
    return {"began": began, "ended": time.perf_counter(), "storage": spent, "errors": errors, "error": error}


def ours(url: str, name: str, trials: int, barrier: Any) -> dict[str, Any]:
    """What the engine does of the search for each trial, in its order; see studies/study.py and trial.py."""
    from crism_mlops.studies.heart import Heart
    from crism_mlops.studies.ledger import end_attempt
    from crism_mlops.studies.processes import here
    from crism_mlops.studies.storage import load_study, open_store

    store = open_store(url, 60.0)
    study = load_study(store, name)
    with Heart(store.ledger, name, here(), 60.0, 10.0) as heart:
        barrier.wait(timeout=300)
        began, spent, errors, error = time.perf_counter(), 0.0, 0, ""
        while True:
            at = time.perf_counter()
            try:
                claim = store.ledger.claim(name, heart.me.worker, trials)
                if claim["what"] == "done":
                    break
                if "trial" in claim:
                    study.sampler = RandomSampler(seed=claim["number"])
                    trial = optuna.trial.Trial(study, claim["trial"])
                    value = sum(trial.suggest_float(key, 0.0, 1.0) for key in KEYS)
                    heart.confirm(claim["number"])
                    study._storage.set_trial_user_attr(claim["trial"], "crism.state", "finished")
                    end_attempt(study._storage, study._storage.get_trial(claim["trial"]), "finished", heart.now())
                    study.tell(trial, value)
                    store.ledger.free(heart.me.worker)
                    spent += time.perf_counter() - at
                else:
                    time.sleep(0.05)  # Others run the last ones: no trial's time.
            except Exception:
                errors, error = errors + 1, error or traceback.format_exc(limit=3)
        ended = time.perf_counter()
    return {"began": began, "ended": ended, "storage": spent, "errors": errors, "error": error}


if __name__ == "__main__":
    main()
