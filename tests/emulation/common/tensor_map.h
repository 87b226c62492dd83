// In place of csrc/common/tensor_map.h: there is no copy engine for tensors here.
#pragma once
