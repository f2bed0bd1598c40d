"""Plants small faults in the code and counts those that no test notices. No part of the package; README.md says how it works."""
