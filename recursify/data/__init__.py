"""From datasets to rows of token ids: text, conversations and questions, local files and the hub.

Imports `utils` and, for the label that does not count, `network`. Start with `loading.py`: `load_blocks` is what training reads. On its
way: `settings.py` (the flags), `documents.py` (finding and reading texts), `blocks.py` (tokenise, pack, cut), `cached_dataset.py` (made
once, kept on disk), `question_sets.py` and `question_rows.py` (questions with one right answer, from the folder tasks). Conversations:
`conversations.py` (their forms), `conversation_tables.py` (reading), `conversation_rows.py` (ids and labels), `conversation_blocks.py`
(packing); `chat_template.py` serves chats, too. `calibration.py` is text that a choice is measured on before a job.
"""

from .._moved import names_of_package

__getattr__ = names_of_package("data")
