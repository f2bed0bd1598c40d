"""Text generation: once, for a file of prompts, interactively, in a chat.

Imports `network`, `checkpoints`, `data` and `utils`. Start with `generation.py`: `generate_text` and `generate_batch`. What shapes the
text is `options.py` (depth, early exit, self-speculation, sampling), the flags are `settings.py`, a prompt becomes ids in `prompt.py`.
`early_exit.py` measures what early exit saves and costs, `prefix_cache.py` keeps the KV cache of a conversation, `streaming.py` cuts text
into whole characters, `cycle_table.py` shows what every cycle would have said. `session.py` is what the commands share; they are
`prompt_file.py`, `interactive.py` and `chat.py`, over `console.py`; chats have `chat_prompt.py` and `transcript.py`, too.
"""
