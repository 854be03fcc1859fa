"""What both ends of the gRPC link share: frames, transfers, certificates."""
