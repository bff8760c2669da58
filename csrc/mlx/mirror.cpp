#include "mirror.h"

#include "call.h"
#include "mlx/backend/cpu/encoder.h"
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

void Mirror::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  Copies copies;
  allocate(inputs, outputs, copies);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (const auto& input : inputs) {
    encoder.set_input_array(input);
  }
  for (auto& output : outputs) {
    encoder.set_output_array(output);
  }
  auto& first = outputs[0];
  if (first.size() == 0) {
    return;
  }
  Arrays temporaries;
  auto run = work(inputs, outputs, copies, temporaries);
  encoder.add_temporaries(std::move(temporaries));
  encoder.dispatch([run = std::move(run), copies = std::move(copies), to = first.data<void>(),
                    dtype = float_dtype(first.dtype()), size = static_cast<int64_t>(first.size()),
                    on = stream()] {
    mend_task_count(on);
    try {
      copies.make();
      run();
    } catch (...) {
      fill_nan(dtype, to, size);
      throw;
    }
  });
}

void Mirror::allocate(const Arrays&, Arrays& outputs, Copies&) {
  for (auto& output : outputs) {
    output.set_data(mx::allocator::malloc(output.nbytes()));
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
