"""Plugins that ship with the product: importable as ``opcua_detector.plugins``."""
