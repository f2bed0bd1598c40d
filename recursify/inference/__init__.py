"""Text generation: once, for a file of prompts, interactively, in a chat.

Imports `network`, `checkpoints`, `data` and `utils`. Start with `generation.py`: `generate_text` and `generate_batch`. Its
parameters are `options.py` (depth, early exit, self-speculation, sampling); the flags are `settings.py`; `prompt.py` tokenizes a prompt.
`early_exit.py` measures the cost and saving of early exit, `prefix_cache.py` keeps the KV cache of a conversation, `streaming.py` decodes
tokens into whole characters, `cycle_table.py` shows the prediction of every cycle. The commands are `prompt_file.py`, `interactive.py` and
`chat.py`; they share `session.py`, `console.py` and `keyboard.py`. Chats also use `chat_prompt.py` and `transcript.py`.
"""
