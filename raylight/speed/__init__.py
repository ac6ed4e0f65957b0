"""What a module costs: latency, throughput, memory and operations, measured until the figures are stable."""
