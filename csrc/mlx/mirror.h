// Primitives that do what a function of MLX does.
#ifndef MOEFAST_MLX_MIRROR_H
#define MOEFAST_MLX_MIRROR_H

#include <functional>
#include <utility>
#include <vector>

#include "layout.h"
#include "mlx/primitives.h"
#include "runnable.h"

namespace moefast::binding {

// Outputs are floats, laid out row-major. Derivatives and vmap are those of MLX's function of the
// same inputs.
class Mirror : public mx::Primitive, public Runnable {
 public:
  using Arrays = std::vector<mx::array>;
  using mx::Primitive::Primitive;

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    evaluate(*this, stream(), inputs, outputs);
  }
  void eval_gpu(const Arrays& inputs, Arrays& outputs) override;
  std::function<void()> prepare(const Arrays& inputs,
                                Arrays& outputs,
                                Arrays& temporaries,
                                long references) override;
  Arrays jvp(const Arrays& primals,
             const Arrays& tangents,
             const std::vector<int>& argnums) override;
  Arrays vjp(const Arrays& primals,
             const Arrays& cotangents,
             const std::vector<int>& argnums,
             const Arrays& outputs) override;
  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs,
                                           const std::vector<int>& axes) override;

 protected:
  // MLX's function. Called on any thread, and after the primitive is gone.
  virtual std::function<Arrays(const Arrays& inputs)> by_mlx() const = 0;
  virtual size_t num_outputs() const { return 1; }
  // Gives the outputs memory: here, of their own. `references`: see Runnable.
  virtual void allocate(const Arrays& inputs, Arrays& outputs, Copies& copies, long references);
  // What the stream's thread is to do, for inputs that MLX holds until it is done. It throws what
  // throw_if_failed() throws.
  virtual std::function<void()> work(const Arrays& inputs,
                                     Arrays& outputs,
                                     Copies& copies,
                                     Arrays& temporaries) const = 0;
  // Of the operation, for messages.
  virtual const char* operation() const = 0;
};

// An array made by a primitive on the default stream.
template <class Primitive, class... Arguments>
mx::array mirrored(mx::Shape shape,
                   mx::Dtype dtype,
                   std::vector<mx::array> inputs,
                   Arguments... arguments) {
  auto primitive = std::make_shared<Primitive>(mx::default_stream(mx::default_device()),
                                               std::move(arguments)...);
  return mx::array(std::move(shape), dtype, std::move(primitive), std::move(inputs));
}

// "(2, 3)"
std::string shape_text(const mx::array& array);

}  // namespace moefast::binding

#endif
