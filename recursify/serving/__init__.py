"""An OpenAI-compatible server over transformers' continuous batching: one batch manager per depth, all over the same weights.

    settings    the flags
    running     from the flags to a server that is up, and down again
    app         HTTP: routes, limits on the body, errors
    protocol    what a body may say, what an answer looks like; needs pydantic, which comes with FastAPI
    answering   the texts that answer one request, from tokens to pieces of text
    engine      who is written for when: a queue and a batch manager per depth
    sampling    each text of a batch by its own temperature, top_p and seed
    metrics     what has happened so far, in Prometheus' text format

FastAPI and uvicorn are needed by `run` alone, and imported there. Floor 3.
"""

from .running import run
from .settings import ServeSettings

__all__ = ["ServeSettings", "run"]
