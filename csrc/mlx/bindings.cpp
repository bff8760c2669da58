// moefast._native: the kernels as MLX operations. Plans are made once for each kind of call, by
// moefast/backends/native; the calls then cost little more than MLX's own operations.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "attention.h"
#include "cached_attention.h"
#include "call.h"
#include "decoding.h"
#include "embed.h"
#include "layers.h"
#include "logsumexp.h"
#include "norm.h"
#include "primitive.h"
#include "reading.h"
#include "rope.h"

using namespace nanobind::literals;

namespace moefast::binding {
namespace {

using Arrays = std::vector<mx::array>;

// A plan as Python sees it. Its methods are the operations.
//
// Those called ..._of take layers instead of arrays, and answer None where the call is not of the
// kind that the plan is for any more: another number of tokens than low..high, dtype, layer,
// device.
class Operator {
 public:
  explicit Operator(std::shared_ptr<const Plan> plan) : plan_(std::move(plan)) {}

  mx::array matmul(const mx::array& x, const Weights& weights) const { return one({x}, weights); }

  Arrays matmuls(const mx::array& x, const Weights& weights) const {
    auto inputs = start({x});
    weights.append_to(inputs);
    return apply(plan_, std::move(inputs));
  }

  mx::array switch_glu(const mx::array& x, const mx::array& indices, const Weights& weights) const {
    return one({x, indices}, weights);
  }

  mx::array experts(const mx::array& x,
                    const mx::array& indices,
                    const mx::array& mix,
                    const Weights& weights) const {
    return one({x, indices, mix}, weights);
  }

  nb::tuple route(const mx::array& logits, nb::handle bias, nb::handle scale) const {
    auto inputs = start({logits});
    add(inputs, bias);
    add(inputs, scale);
    auto outputs = apply(plan_, std::move(inputs));
    // Whatever is made of a choice has no derivative by what it was made from.
    return nb::make_tuple(mx::stop_gradient(outputs[0]), outputs[1]);
  }

  mx::array moe(const mx::array& x,
                const mx::array& logits,
                nb::handle bias,
                nb::handle scale,
                const Weights& weights,
                const Weights* shared) const {
    auto inputs = start({x, logits});
    add(inputs, bias);
    add(inputs, scale);
    weights.append_to(inputs);
    if (shared != nullptr) {
      shared->append_to(inputs);
    }
    return apply(plan_, std::move(inputs))[0];
  }

  nb::object matmul_of(
      nb::handle x, nb::handle layer, nb::handle type, size_t low, size_t high) const {
    Gathered inputs;
    if (!begin(inputs, x, low, high, mx::Device::cpu) ||
        !append_layer(layer, type, plan_->weights[0], inputs)) {
      return nb::none();
    }
    return if_fitting(std::move(inputs.arrays));
  }

  // Of several layers: the outputs as a list.
  nb::object matmuls_of(nb::handle x,
                        const nb::tuple& layers,
                        const nb::tuple& types,
                        size_t low,
                        size_t high) const {
    Gathered inputs;
    if (!begin(inputs, x, low, high, mx::Device::cpu) || layers.size() != plan_->weights.size()) {
      return nb::none();
    }
    for (size_t i = 0; i < layers.size(); ++i) {
      if (!append_layer(layers[i], types[i], plan_->weights[i], inputs)) {
        return nb::none();
      }
    }
    try {
      return nb::cast(apply(plan_, std::move(inputs.arrays)));
    } catch (const std::invalid_argument&) {
      return nb::none();
    }
  }

  // `types` of experts and its projections, of shared and its, and of shared_gate, as far as they
  // are there.
  nb::object moe_of(nb::handle x,
                    nb::handle logits,
                    nb::handle bias,
                    nb::handle experts,
                    nb::handle shared,
                    nb::handle shared_gate,
                    const nb::tuple& types,
                    size_t low,
                    size_t high) const {
    Gathered inputs;
    if (!begin(inputs, x, low, high, mx::Device::cpu) || !inputs.add(logits) ||
        (!bias.is_none() && !inputs.add(bias)) ||
        !append_block(experts, shared, shared_gate, types, *plan_, inputs)) {
      return nb::none();
    }
    return if_fitting(std::move(inputs.arrays));
  }

  // The inputs of moe_of as a flat tuple, for kernels that are launched from Python on `device`.
  // None also where MLX traces a transformation, which those cannot serve, or where a weight does
  // not lie row by row in memory that it has already.
  nb::object moe_inputs_of(mx::Device::DeviceType device,
                           nb::handle x,
                           nb::handle logits,
                           nb::handle bias,
                           nb::handle experts,
                           nb::handle shared,
                           nb::handle shared_gate,
                           const nb::tuple& types,
                           size_t low,
                           size_t high) const {
    Gathered inputs;
    if (!begin(inputs, x, low, high, device) || !inputs.add(logits) ||
        (!bias.is_none() && !inputs.add(bias))) {
      return nb::none();
    }
    const size_t own = inputs.arrays.size();
    if (!append_block(experts, shared, shared_gate, types, *plan_, inputs)) {
      return nb::none();
    }
    const auto& arrays = inputs.arrays;
    if (std::any_of(arrays.begin(), arrays.end(), [](const auto& a) { return a.is_tracer(); }) ||
        !std::all_of(arrays.begin() + own, arrays.end(), lies_in_rows) || !plan_->fits(arrays)) {
      return nb::none();
    }
    return nb::steal(tuple_of(inputs.objects));
  }

 private:
  Arrays start(std::initializer_list<mx::array> own) const {
    Arrays inputs;
    inputs.reserve(static_cast<size_t>(plan_->num_inputs));
    inputs.insert(inputs.end(), own);
    return inputs;
  }

  static void add(Arrays& inputs, nb::handle array) {
    if (!array.is_none()) {
      inputs.push_back(nb::cast<const mx::array&>(array));
    }
  }

  mx::array one(std::initializer_list<mx::array> own, const Weights& weights) const {
    auto inputs = start(own);
    weights.append_to(inputs);
    return apply(plan_, std::move(inputs))[0];
  }

  // Takes x, the first of the inputs, if it has low..high tokens.
  bool begin(Gathered& inputs, nb::handle x, size_t low, size_t high, mx::Device device) const {
    inputs.reserve(static_cast<size_t>(plan_->num_inputs));
    if (!inputs.add(x)) {
      return false;
    }
    const auto& array = inputs.arrays[0];
    const size_t dims = array.ndim() > 0 ? static_cast<size_t>(array.shape(-1)) : 0;
    return dims > 0 && low * dims <= array.size() && array.size() / dims <= high &&
           mx::default_device() == device;
  }

  static bool lies_in_rows(const mx::array& array) {
    return array.status() != mx::array::Status::unscheduled && array.flags().row_contiguous;
  }

  static PyObject* tuple_of(const std::vector<nb::handle>& objects) {
    PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(objects.size()));
    if (tuple == nullptr) {
      nb::raise_python_error();
    }
    for (size_t i = 0; i < objects.size(); ++i) {
      PyTuple_SET_ITEM(tuple, static_cast<Py_ssize_t>(i), objects[i].inc_ref().ptr());
    }
    return tuple;
  }

  nb::object if_fitting(Arrays inputs) const {
    try {
      return nb::cast(apply(plan_, std::move(inputs))[0]);
    } catch (const std::invalid_argument&) {
      return nb::none();
    }
  }

  std::shared_ptr<const Plan> plan_;
};

Operator plan(std::string op,
              std::vector<std::optional<std::string>> dtypes,
              nb::object spec,
              nb::object layout,
              nb::object shared,
              nb::object shared_gate,
              std::optional<std::string> combine_dtype,
              std::string out_dtype,
              nb::callable reference) {
  return Operator(plan_of({.op = std::move(op),
                           .dtypes = std::move(dtypes),
                           .spec = std::move(spec),
                           .layout = std::move(layout),
                           .shared = std::move(shared),
                           .shared_gate = std::move(shared_gate),
                           .combine_dtype = std::move(combine_dtype),
                           .out_dtype = std::move(out_dtype),
                           .reference = std::move(reference)}));
}

std::vector<std::string> isas() {
  const char* names[16];
  const size_t count = moefast_isas(names, 16);
  return {names, names + std::min<size_t>(count, 16)};
}

int visit_decoding(PyObject* self, visitproc visit, void* arg) {
  Py_VISIT(Py_TYPE(self));
  return nb::inst_ready(self) ? nb::inst_ptr<Decoding>(self)->visit_objects(visit, arg) : 0;
}

int clear_decoding(PyObject* self) {
  nb::inst_ptr<Decoding>(self)->forget();
  return 0;
}

PyType_Slot decoding_slots[] = {{Py_tp_traverse, reinterpret_cast<void*>(visit_decoding)},
                                {Py_tp_clear, reinterpret_cast<void*>(clear_decoding)},
                                {0, nullptr}};

// Those that are there already: nothing is evaluated.
int64_t huge_pages(const std::vector<mx::array>& arrays) {
  int64_t bytes = 0;
  for (const auto& array : arrays) {
    if (array.is_available() && array.flags().contiguous) {
      bytes += moefast_huge_pages(array.data<char>(),
                                  static_cast<int64_t>(array.data_size() * array.itemsize()));
    }
  }
  return bytes;
}

// What MLX raises as RuntimeError, because it was thrown on a stream's thread, becomes what it was.
void translate(const std::exception_ptr& error, void*) {
  try {
    std::rethrow_exception(error);
  } catch (const std::runtime_error& known) {
    const int status = failed_with(known.what());
    if (status == MOEFAST_OK) {
      throw;
    }
    PyErr_SetString(status == MOEFAST_OUT_OF_MEMORY ? PyExc_MemoryError : PyExc_ValueError,
                    known.what());
  }
}

}  // namespace
}  // namespace moefast::binding

NB_MODULE(_native, m) {
  using namespace moefast::binding;
  const auto none = nb::none();

  m.doc() = "moefast's CPU kernels as MLX operations; see moefast/backends/native.";
  m.attr("built_for_mlx") = MOEFAST_BUILT_FOR_MLX;
  nb::register_exception_translator(translate);

  nb::class_<Weights>(m, "Weights").def(nb::init<std::vector<nb::object>>(), "arrays"_a);
  nb::class_<Operator>(m, "Operator")
      .def("matmul", &Operator::matmul)
      .def("matmuls", &Operator::matmuls)
      .def("switch_glu", &Operator::switch_glu)
      .def("experts", &Operator::experts)
      .def("route", &Operator::route, "logits"_a, "bias"_a.none(), "scale"_a.none())
      .def("moe", &Operator::moe, "x"_a, "logits"_a, "bias"_a.none(), "scale"_a.none(), "weights"_a,
           "shared"_a.none())
      .def("matmul_of", &Operator::matmul_of)
      .def("matmuls_of", &Operator::matmuls_of)
      .def("moe_of", &Operator::moe_of, "x"_a, "logits"_a, "bias"_a.none(), "experts"_a,
           "shared"_a.none(), "shared_gate"_a.none(), "types"_a, "low"_a, "high"_a)
      .def("moe_inputs_of", &Operator::moe_inputs_of, "device"_a, "x"_a, "logits"_a,
           "bias"_a.none(), "experts"_a, "shared"_a.none(), "shared_gate"_a.none(), "types"_a,
           "low"_a, "high"_a);

  m.def("plan", &plan, "op"_a, "dtypes"_a, nb::kw_only(), "spec"_a = none, "layout"_a = none,
        "shared"_a = none, "shared_gate"_a = none, "combine_dtype"_a = none, "out_dtype"_a,
        "reference"_a);

  m.def("attention", &attention, "queries"_a, "keys"_a, "values"_a, "scale"_a, "causal"_a);
  m.def("cached_attention", &cached_attention, "queries"_a, "keys"_a, "values"_a, "cache_keys"_a,
        "cache_values"_a, "offset"_a, "dims"_a, "traditional"_a, "base"_a.none(),
        "position_scale"_a, "freqs"_a.none(), "scale"_a, "causal"_a);
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a);
  m.def("layer_norm", &layer_norm, "x"_a, "weight"_a.none(), "bias"_a.none(), "eps"_a);
  m.def("add_rms_norm", &add_rms_norm, "x"_a, "branch"_a, "weight"_a.none(), "eps"_a,
        "multiplier"_a);
  m.def("add_layer_norm", &add_layer_norm, "x"_a, "branch"_a, "weight"_a.none(), "bias"_a.none(),
        "eps"_a, "multiplier"_a);
  m.def("logsumexp", &logsumexp, "x"_a);
  m.def("rope", &rope, "x"_a, "dims"_a, "traditional"_a, "base"_a.none(), "scale"_a, "offset"_a,
        "freqs"_a.none());
  m.def("embed", &embed, "indices"_a, "weight"_a, "scales"_a, "biases"_a.none(),
        "global_scale"_a.none(), "group_size"_a, "bits"_a, "mode"_a);
  m.def("embed_of", &embed_of);

  nb::class_<Decoding>(m, "Decoding", nb::type_slots(decoding_slots))
      .def(nb::init<>())
      .def("record", &Decoding::record, "model"_a, "inputs"_a, "caches"_a, "offset"_a, "before"_a,
           "logits"_a, "facts"_a, nb::lock_self())
      .def("again", &Decoding::again, "model"_a, "inputs"_a, "caches"_a, "facts"_a,
           nb::lock_self());

  m.def("configure", &configure, "threads"_a, "isa"_a);
  m.def("isas", &isas);
  m.def("usable_cores", &moefast_usable_cores);
  m.def("huge_pages", &huge_pages, "arrays"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("engine_threads", [] { return moefast_engine_threads(engine()); });
  m.def("engine_isa", [] { return std::string(moefast_engine_isa(engine())); });
}
