// moefast._kernels: the kernels on NumPy arrays, without MLX. For tests, fuzzing and measurements,
// and in place of moefast._native where that was built for another MLX.
#include <algorithm>

#include "weights.h"

namespace moefast::binding {
namespace {

using MaybeDtype = std::optional<std::string>;

// Raises what the last call on this thread had to say. Needs the GIL.
void check(int status) {
  if (status == MOEFAST_OK) {
    return;
  }
  PyErr_SetString(status == MOEFAST_OUT_OF_MEMORY ? PyExc_MemoryError : PyExc_ValueError,
                  moefast_error());
  throw py::error_already_set();
}

template <class Call>
void run(Call&& call) {
  int status;
  std::string error;
  {
    const py::gil_scoped_release release;
    status = call();
  }
  check(status);
}

class Engine {
 public:
  Engine(int threads, const std::string& isa) {
    check(moefast_engine_create(threads, isa.c_str(), &engine_));
  }
  ~Engine() { moefast_engine_destroy(engine_); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  moefast_engine* get() const { return engine_; }

 private:
  moefast_engine* engine_ = nullptr;
};

int32_t output_dtype(const MaybeDtype& asked, int32_t otherwise) {
  return asked ? dtype_of(*asked) : otherwise;
}

py::array matmul(const Engine& engine,
                 const py::array& x,
                 const Projection& weight,
                 const MaybeDtype& out_dtype) {
  const auto& w = weight.description();
  const auto rows = rows_of("matmul", "x", x, w.in_dims);
  const int32_t dtype = output_dtype(out_dtype, rows.dtype);
  py::array out = empty(dtype, leading(x, {w.out_dims}));
  void* to = out.mutable_data();
  run([&] { return moefast_matmul(engine.get(), &rows, &w, &to, 1, dtype); });
  return out;
}

// The shape of indices and routing weights: x's, with top_k last.
std::vector<py::ssize_t> check_routes(const char* op,
                                      const py::array& x,
                                      const py::array& indices) {
  const py::ssize_t last = indices.ndim() - 1;
  const auto shape = leading(x, {last < 0 ? 0 : indices.shape(last)});
  check_shape(op, "indices", indices, shape);
  if (shape.back() == 0) {
    refuse(op, "indices must name at least one expert per token", describe(indices));
  }
  return shape;
}

py::array switch_glu(const Engine& engine,
                     const py::array& x,
                     const Ffn& experts,
                     const py::array& indices,
                     const MaybeDtype& out_dtype) {
  constexpr const char* op = "switch_glu";
  const auto rows = rows_of(op, "x", x, experts.hidden());
  auto shape = check_routes(op, x, indices);
  const int64_t top_k = shape.back();
  const auto chosen = indices_of(op, indices, experts.num_experts());
  const int32_t dtype = output_dtype(out_dtype, rows.dtype);
  shape.push_back(experts.hidden());
  py::array out = empty(dtype, shape);
  void* to = out.mutable_data();
  run([&] {
    return moefast_switch_glu(engine.get(), &rows, &experts.description(), chosen.data(), top_k, to,
                              dtype);
  });
  return out;
}

py::array experts(const Engine& engine,
                  const py::array& x,
                  const Ffn& experts,
                  const py::array& indices,
                  const py::array& weights,
                  const MaybeDtype& out_dtype) {
  constexpr const char* op = "experts";
  const auto rows = rows_of(op, "x", x, experts.hidden());
  const auto shape = check_routes(op, x, indices);
  const auto mix = vector_of(op, "weights", weights, shape);
  const auto chosen = indices_of(op, indices, experts.num_experts());
  const int32_t dtype = output_dtype(out_dtype, rows.dtype);
  py::array out = empty(dtype, leading(x, {experts.hidden()}));
  void* to = out.mutable_data();
  run([&] {
    return moefast_experts(engine.get(), &rows, &experts.description(), chosen.data(), &mix,
                           shape.back(), to, dtype);
  });
  return out;
}

py::tuple route(const Engine& engine,
                const py::array& logits,
                const py::object& spec,
                const MaybeArray& selection_bias,
                const MaybeArray& expert_scale,
                const std::string& weights_dtype) {
  constexpr const char* op = "route";
  const auto router = router_of(Attributes{spec});
  const auto rows = rows_of(op, "logits", logits, router.num_experts);
  const auto bias = vector_of(op, "selection_bias", selection_bias, {router.num_experts});
  const auto scale = vector_of(op, "expert_scale", expert_scale, {router.num_experts});
  const int32_t dtype = dtype_of(weights_dtype);
  if (router.top_k < 1 || router.top_k > router.num_experts) {
    refuse(op, "top_k must be in 1..num_experts", std::to_string(router.top_k));
  }
  const auto shape = leading(logits, {router.top_k});
  py::array_t<uint32_t> indices(shape);
  py::array weights = empty(dtype, shape);
  uint32_t* to = indices.mutable_data();
  void* mix = weights.mutable_data();
  run([&] { return moefast_route(engine.get(), &rows, &router, &bias, &scale, to, mix, dtype); });
  return py::make_tuple(indices, weights);
}

py::array moe(const Engine& engine,
              const py::array& x,
              const py::array& logits,
              const py::object& spec,
              const Ffn& experts,
              const MaybeArray& selection_bias,
              const MaybeArray& expert_scale,
              const Ffn* shared,
              const Projection* shared_gate,
              const MaybeDtype& combine_dtype,
              const MaybeDtype& out_dtype) {
  constexpr const char* op = "moe";
  const auto router = router_of(Attributes{spec});
  const auto rows = rows_of(op, "x", x, experts.hidden());
  check_shape(op, "logits", logits, leading(x, {router.num_experts}));
  const auto scores = rows_of(op, "logits", logits, router.num_experts);
  const auto bias = vector_of(op, "selection_bias", selection_bias, {router.num_experts});
  const auto scale = vector_of(op, "expert_scale", expert_scale, {router.num_experts});
  const int32_t dtype = output_dtype(out_dtype, rows.dtype);
  const int32_t combine = dtype_or(combine_dtype);
  py::array out = empty(dtype, leading(x, {experts.hidden()}));
  void* to = out.mutable_data();
  run([&] {
    return moefast_moe(engine.get(), &rows, &scores, &router, &bias, &scale, &experts.description(),
                       shared != nullptr ? &shared->description() : nullptr,
                       shared_gate != nullptr ? &shared_gate->description() : nullptr, combine, to,
                       dtype);
  });
  return out;
}

py::array attention(const Engine& engine,
                    const py::array& queries,
                    const py::array& keys,
                    const py::array& values,
                    float scale,
                    bool causal,
                    const MaybeDtype& out_dtype) {
  constexpr const char* op = "attention";
  const auto q = heads_of(op, "queries", queries);
  const auto k = heads_of(op, "keys", keys), v = heads_of(op, "values", values);
  const int32_t dtype = output_dtype(out_dtype, q.dtype);
  py::array out = empty(dtype, {q.batch, q.length, q.heads * v.dims});
  void* to = out.mutable_data();
  run([&] { return moefast_attention(engine.get(), &q, &k, &v, scale, causal, to, dtype); });
  return out;
}

double measure_read(const Engine& engine, int threads, size_t bytes) {
  double found = 0;
  run([&] { return moefast_measure_read(engine.get(), threads, bytes, &found); });
  return found;
}

double measure_flops(const Engine& engine, int threads) {
  double found = 0;
  run([&] { return moefast_measure_flops(engine.get(), threads, &found); });
  return found;
}

std::vector<std::string> isas() {
  const char* names[16];
  const size_t count = moefast_isas(names, 16);
  return {names, names + std::min<size_t>(count, 16)};
}

}  // namespace
}  // namespace moefast::binding

PYBIND11_MODULE(_kernels, m) {
  using namespace moefast::binding;
  using py::arg;
  const auto none = py::none();

  m.doc() = "moefast's CPU kernels on NumPy arrays; bfloat16 is passed as uint16.";

  py::class_<Projection, std::shared_ptr<Projection>>(
      m, "Projection", "A weight, like moefast.Projection but of contiguous NumPy arrays.")
      .def(py::init<py::array, MaybeArray, MaybeArray, MaybeArray, MaybeArray, py::object>(),
           arg("weight"), arg("scales") = none, arg("biases") = none, py::kw_only(),
           arg("bias") = none, arg("global_scale") = none, arg("quant") = none);
  py::class_<Ffn>(m, "Ffn", "down(activation(gate(x), up(x))): experts, or a shared expert.")
      .def(py::init<std::shared_ptr<Projection>, std::shared_ptr<Projection>,
                    std::shared_ptr<Projection>, py::object>(),
           py::kw_only(), arg("up").none(false), arg("down").none(false), arg("gate") = none,
           arg("activation"));

  py::class_<Engine>(m, "Engine", "Threads, an instruction set and scratch memory.")
      .def(py::init<int, std::string>(), arg("threads") = 0, arg("isa") = "")
      .def_property_readonly("threads",
                             [](const Engine& e) { return moefast_engine_threads(e.get()); })
      .def_property_readonly("isa", [](const Engine& e) { return moefast_engine_isa(e.get()); })
      .def_property_readonly(
          "scratch", [](const Engine& e) { return moefast_engine_scratch(e.get()); },
          "Bytes of scratch memory held between calls.")
      .def("matmul", &matmul, arg("x"), arg("weight"), py::kw_only(), arg("out_dtype") = none)
      .def("switch_glu", &switch_glu, arg("x"), arg("experts"), arg("indices"), py::kw_only(),
           arg("out_dtype") = none)
      .def("experts", &experts, arg("x"), arg("experts"), arg("indices"), arg("weights"),
           py::kw_only(), arg("out_dtype") = none)
      .def("route", &route, arg("logits"), arg("spec"), py::kw_only(), arg("selection_bias") = none,
           arg("expert_scale") = none, arg("weights_dtype") = "float32")
      .def("moe", &moe, arg("x"), arg("logits"), arg("spec"), arg("experts"), py::kw_only(),
           arg("selection_bias") = none, arg("expert_scale") = none, arg("shared") = none,
           arg("shared_gate") = none, arg("combine_dtype") = none, arg("out_dtype") = none)
      .def("attention", &attention, arg("queries"), arg("keys"), arg("values"), py::kw_only(),
           arg("scale"), arg("causal"), arg("out_dtype") = none)
      .def("measure_read", &measure_read, arg("threads"), arg("bytes"), "Bytes per second.")
      .def("measure_flops", &measure_flops, arg("threads"),
           "Floating point operations per second.");

  m.def("isas", &isas, "Instruction sets that this build has and this machine runs, best first.");
  m.def("usable_cores", &moefast_usable_cores);
}
