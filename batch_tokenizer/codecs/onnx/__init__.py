"""Codecs as ONNX graphs: published and our own ones run by onnxruntime, and MOSS written as such graphs."""
