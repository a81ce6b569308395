"""The simulated plant: two known processes with known faults, seen through a real OPC UA server.

It exists so that a detector can be tested against a plant whose faults, timing and bad manners are
known exactly.  It shares nothing with the detector but a NodeSet2 file and the wire.
"""
