"""Annotated sample configurations; in the package they are `opcua_detector.samples`, from which the demo runs."""
