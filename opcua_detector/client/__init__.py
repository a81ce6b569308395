"""The OPC UA client: session, nodes, subscription to frames, history, write-back."""
