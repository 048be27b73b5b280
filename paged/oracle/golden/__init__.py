"""Golden files: cases, right answers and bounds on disk, for kernels that are not Python.

files      the tensors of one case as a safetensors file, and what somebody's output file has to hold
manifest   manifest.json: what is declared, each file's hash and case, what it exercises
export     choose cases and write the folder
judge      hold an output file against the folder, and say which token is wrong
"""
