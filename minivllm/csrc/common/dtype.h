// Dtypes as the launchers of the .cu files take them; the only thing both sides of the CUDA border include.
#pragma once

namespace minivllm {

enum class DtypeCode : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

}  // namespace minivllm
