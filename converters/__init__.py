"""From trained weights to PyTorch folders, ONNX graphs and Hexagon binaries, and from released weights to ours."""
