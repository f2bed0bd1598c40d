"""An OpenAI-compatible server over transformers' continuous batching: one batch manager per depth, all over the same weights.

Imports `inference`, `checkpoints` and `network`. FastAPI and uvicorn are needed by `run` alone, and imported there. Start with
`answering.py`: the texts that answer one request, from tokens to pieces of text. Around it: `running.py` (from the flags, `settings.py`,
to a server that is up, and down again), `app.py` (HTTP: routes, limits, errors), `connections.py` (those that come to nothing end),
`protocol.py` (bodies of requests and answers),
`engine.py` (a queue and a batch manager for each depth), `sampling.py` (each text of a batch by its own penalties, temperature, top_k,
top_p and seed), `pieces.py` (what an answer is made of), `logprobs.py` (the log-probabilities of a text's tokens),
`tool_calls.py` (calls of tools in a text), `metrics.py` (in Prometheus' text format).
"""

from .running import EngineStopped, run
from .settings import ServeSettings

__all__ = ["EngineStopped", "ServeSettings", "run"]
