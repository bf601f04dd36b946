"""How the tests' programs are compiled: quickly. Compiling takes most of the suite's time, and running them little."""

# LLVM optimises nothing, and XLA writes fused operations by its older emitters, which compile in a third of the time.
FLAGS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
