#include "mirror.h"

#include "plan.h"
#include "spec.h"

namespace moefast::binding {
namespace {

using Arrays = Mirror::Arrays;

Arrays pick(const Arrays& inputs, const std::vector<int>& argnums) {
  Arrays some;
  for (const int i : argnums) {
    some.push_back(inputs[i]);
  }
  return some;
}

// MLX's function of some of the inputs, the others given.
std::function<Arrays(const Arrays&)> of_some(std::function<Arrays(const Arrays&)> by_mlx,
                                             const Arrays& inputs,
                                             const std::vector<int>& argnums) {
  return [by_mlx = std::move(by_mlx), &inputs, &argnums](const Arrays& some) {
    Arrays all = inputs;
    for (size_t i = 0; i < argnums.size(); ++i) {
      all[argnums[i]] = some[i];
    }
    return by_mlx(all);
  };
}

}  // namespace

std::function<void()> Mirror::prepare(const Arrays& inputs,
                                      Arrays& outputs,
                                      Arrays& temporaries,
                                      long references) {
  Copies copies;
  allocate(inputs, outputs, copies, references);
  const auto& first = outputs[0];
  if (first.size() == 0) {
    return nullptr;
  }
  auto run = work(inputs, outputs, copies, temporaries);
  return
      [run = std::move(run), copies = std::move(copies), to = const_cast<void*>(first.data<void>()),
       dtype = float_dtype(first.dtype()), size = static_cast<int64_t>(first.size())] {
        try {
          copies.make();
          run();
        } catch (...) {
          fill_nan(dtype, to, size);
          throw;
        }
      };
}

void Mirror::allocate(const Arrays&, Arrays& outputs, Copies&, long) {
  for (auto& output : outputs) {
    give_memory(output);
  }
}

void Mirror::eval_gpu(const Arrays&, Arrays&) {
  refuse(operation(), "backend 'native' must run on a CPU stream", "a GPU stream");
}

Arrays Mirror::jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) {
  return mx::jvp(of_some(by_mlx(), primals, argnums), pick(primals, argnums), tangents).second;
}

Arrays Mirror::vjp(const Arrays& primals,
                   const Arrays& cotangents,
                   const std::vector<int>& argnums,
                   const Arrays&) {
  return mx::vjp(of_some(by_mlx(), primals, argnums), pick(primals, argnums), cotangents).second;
}

std::pair<Arrays, std::vector<int>> Mirror::vmap(const Arrays& inputs,
                                                 const std::vector<int>& axes) {
  const std::vector<int> out_axes(num_outputs(), 0);
  return {mx::vmap(by_mlx(), axes, out_axes)(inputs), out_axes};
}

std::string shape_text(const mx::array& array) {
  std::string text = "(";
  for (size_t i = 0; i < array.ndim(); ++i) {
    text += (i > 0 ? ", " : "") + std::to_string(array.shape(static_cast<int>(i)));
  }
  return text + ")";
}

}  // namespace moefast::binding
