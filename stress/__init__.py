"""Broken on purpose: kills, bad bytes and a long night, for as long as is given. README.md says how."""
