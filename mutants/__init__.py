"""Mutation testing: plants small faults and counts those that no test detects. No part of the package; README.md says how it works."""
