"""Anomaly detection that lives next to the PLC.

Samples OPC UA tags, scores them in one low-latency loop with methods learnt from healthy rows alone, and writes
scores and explanations back as nodes that any HMI shows. The command line is `opcua-detector`.
"""

__version__ = "0.1.0"
