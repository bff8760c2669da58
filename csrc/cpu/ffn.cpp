#include "ffn.h"

#include <algorithm>
#include <cstring>

namespace moefast {
namespace {

// Columns of the output that one piece sums up for all tokens: so many bytes stay in a core's
// cache.
constexpr int64_t kSumBytes = 512 << 10;
constexpr int64_t kMostColumns = 256;

// A product that packs its rows has a beginning that nothing overlaps, and needs a piece's weights
// only once: its pieces are so many times larger.
constexpr int64_t kPackedPieces = 8;

// Rows [begin, end) of the gate and up weights of one expert.
struct Piece {
  int32_t expert;
  int64_t begin;
  int64_t end;
};

class Run {
 public:
  Run(moefast_engine& engine, const FeedForward& work)
      : engine_(engine), isa_(engine.isa), work_(work), hidden_(work.x.dims) {}

  void operator()() {
    plan();
    prepare_x();
    engine_.pool.run(static_cast<int64_t>(pieces_.size()),
                     [&](int64_t item, int64_t next, int thread) { up(item, next, thread); });
    prepare_inner();
    const int64_t count = (hidden_ + columns_ - 1) / columns_;
    engine_.pool.run(count, [&](int64_t item, int64_t next, int thread) {
      const int64_t following = next < 0 ? -1 : next * columns_;
      down(item * columns_, std::min(hidden_, (item + 1) * columns_), following, thread);
    });
  }

 private:
  void plan() {
    const auto& experts = work_.experts;
    const int threads = engine_.pool.threads();
    int64_t inner_size = 0, widest_piece = 0, most_routes = 0, most_down = kMostColumns, rows = 0;
    for (const Expert& expert : experts) {
      rows += expert.up.matrix.out;
    }
    for (size_t e = 0; e < experts.size(); ++e) {
      const Matrix& up = experts[e].up.matrix;
      const int64_t routes = experts[e].end - experts[e].begin;
      const bool packed =
          routes > 16 && !find_product(isa_, up.format, work_.precision, up.in, routes)->by_row;
      const int64_t step = rows_per_piece(up, rows, threads, routes) * (packed ? kPackedPieces : 1);
      for (int64_t n = 0; n < up.out; n += step) {
        pieces_.push_back({static_cast<int32_t>(e), n, std::min(up.out, n + step)});
      }
      inner_at_.push_back(inner_size);
      inner_size += routes * up.out;
      widest_piece = std::max(widest_piece, step);
      most_routes = std::max(most_routes, routes);
      const Matrix& down = experts[e].down.matrix;
      most_down = std::min(most_down, rows_per_piece(down, hidden_, threads, routes));
    }
    // A few tokens: pieces as small as the threads like them. Many: as wide as the cache holds
    // sums.
    const int64_t fitting = kSumBytes / 4 / std::max<int64_t>(work_.x.count, 1) / 32 * 32;
    columns_ = work_.x.count == 1 ? most_down : std::clamp<int64_t>(fitting, 32, kMostColumns);

    inner_ = engine_.scratch.take<float>(inner_size);
    products_size_ = round_up(most_routes * std::max(widest_piece, columns_), 16);
    products_ = engine_.scratch.take<float>(threads * products_size_);
    sums_size_ = work_.apart ? 0 : round_up(work_.x.count * columns_, 16);
    sums_ = engine_.scratch.take<float>(threads * sums_size_);
  }

  void prepare_x() {
    const auto& experts = work_.experts;
    auto* tokens = engine_.scratch.take<int32_t>(static_cast<int64_t>(work_.routes.size()));
    for (size_t i = 0; i < work_.routes.size(); ++i) {
      tokens[i] = work_.routes[i].token;
    }
    for (const Expert& e : experts) {
      const int64_t count = e.end - e.begin;
      const Linear& gate = e.gate.matrix.weight ? e.gate : e.up;  // unused where there is none
      x_.push_back({&gate.matrix, tokens + e.begin, count});
      x_.push_back({&e.up.matrix, tokens + e.begin, count});
    }
    prepare(engine_, work_.x, work_.precision, x_.data(), static_cast<int64_t>(x_.size()));
  }

  void up(int64_t item, int64_t next, int thread) {
    const Piece& piece = pieces_[item];
    const Expert& expert = work_.experts[piece.expert];
    const int64_t width = expert.up.matrix.out, size = piece.end - piece.begin;
    const int64_t count = expert.end - expert.begin;
    const Operand& for_gate = x_[2 * piece.expert];
    const Operand& for_up = x_[2 * piece.expert + 1];
    Ahead after{};
    if (next >= 0) {
      const Piece& following = pieces_[next];
      const Matrix& first = *x_[2 * following.expert].matrix;
      after = ahead_of(first, following.begin, following.end);
    }
    float* inner = inner_ + inner_at_[piece.expert] + piece.begin;
    float* gate = nullptr;
    if (expert.gate.matrix.weight != nullptr) {
      gate = products_ + thread * products_size_;
      for_gate.multiply(piece.begin, piece.end, gate, size,
                        ahead_of(expert.up.matrix, piece.begin, piece.end));
      add_bias(isa_, expert.gate, piece.begin, piece.end, count, gate, size);
    }
    for_up.multiply(piece.begin, piece.end, inner, width, after);
    add_bias(isa_, expert.up, piece.begin, piece.end, count, inner, width);
    for (int64_t r = 0; r < count; ++r) {
      isa_.activate(*expert.activation, gate ? gate + r * size : nullptr, inner + r * width, size);
    }
  }

  // The activations, input of the down projections. Experts of one width share their preparation.
  void prepare_inner() {
    const auto& experts = work_.experts;
    auto* slots = engine_.scratch.take<int32_t>(static_cast<int64_t>(work_.routes.size()));
    for (size_t begin = 0, end; begin < experts.size(); begin = end) {
      const int64_t width = experts[begin].up.matrix.out;
      end = begin;
      while (end < experts.size() && experts[end].up.matrix.out == width) {
        ++end;
      }
      const int64_t first = experts[begin].begin;
      const Source source{reinterpret_cast<const uint8_t*>(inner_ + inner_at_[begin]), 4 * width,
                          experts[end - 1].end - first, width, MOEFAST_FLOAT32};
      for (size_t e = begin; e < end; ++e) {
        for (int64_t i = experts[e].begin; i < experts[e].end; ++i) {
          slots[i] = static_cast<int32_t>(i - first);
        }
        inner_operands_.push_back(
            {&experts[e].down.matrix, slots + experts[e].begin, experts[e].end - experts[e].begin});
      }
      prepare(engine_, source, work_.precision, inner_operands_.data() + begin,
              static_cast<int64_t>(end - begin));
    }
  }

  // Columns [begin, end) of the output, for all experts one after another.
  void down(int64_t begin, int64_t end, int64_t following, int thread) {
    const int64_t size = end - begin;
    float* sums = sums_ + thread * sums_size_;
    float* products = products_ + thread * products_size_;
    if (!work_.apart) {
      std::memset(sums, 0, static_cast<size_t>(work_.x.count * size) * sizeof(float));
    }
    for (size_t e = 0; e < work_.experts.size(); ++e) {
      const Expert& expert = work_.experts[e];
      const int64_t count = expert.end - expert.begin;
      Ahead after{};
      if (e + 1 < work_.experts.size()) {
        after = ahead_of(work_.experts[e + 1].down.matrix, begin, end);
      } else if (following >= 0) {
        after = ahead_of(work_.experts[0].down.matrix, following,
                         std::min(hidden_, following + columns_));
      }
      inner_operands_[e].multiply(begin, end, products, size, after);
      add_bias(isa_, expert.down, begin, end, count, products, size);
      for (int64_t r = 0; r < count; ++r) {
        const Routed& route = work_.routes[expert.begin + r];
        if (work_.apart) {
          isa_.narrow(work_.out_dtype, products + r * size, size, at(route.place, begin));
        } else {
          isa_.add_scaled(route.weight, products + r * size, size, sums + route.token * size);
        }
      }
    }
    if (!work_.apart) {
      finish(sums, begin, size, products);
    }
  }

  void finish(float* sums, int64_t begin, int64_t size, float* spare) {
    for (int64_t t = 0; t < work_.x.count; ++t) {
      float* sum = sums + t * size;
      if (work_.identity != nullptr && work_.identity[t] != 0.0f) {
        const auto* x = static_cast<const uint8_t*>(work_.x.row(t));
        isa_.widen(work_.x.dtype, x + begin * size_of(work_.x.dtype), size, spare);
        isa_.add_scaled(work_.identity[t], spare, size, sum);
      }
      isa_.narrow(work_.out_dtype, sum, size, at(t, begin));
    }
  }

  uint8_t* at(int64_t row, int64_t column) const {
    return static_cast<uint8_t*>(work_.out) + (row * hidden_ + column) * size_of(work_.out_dtype);
  }

  moefast_engine& engine_;
  const Isa& isa_;
  const FeedForward& work_;
  const int64_t hidden_;
  std::vector<Piece> pieces_;
  std::vector<int64_t> inner_at_;  // where each expert's activations begin in inner_
  std::vector<Operand> x_;         // gate's and up's, by turns
  std::vector<Operand> inner_operands_;
  int64_t columns_ = 0;
  float* inner_ = nullptr;  // activations: per expert [routes, width]
  float* products_ = nullptr;
  int64_t products_size_ = 0;
  float* sums_ = nullptr;
  int64_t sums_size_ = 0;
};

void add_expert(
    const moefast_ffn& ffn, int64_t index, int64_t begin, int64_t end, FeedForward& work) {
  Expert expert{};
  if (ffn.gate != nullptr) {
    expert.gate = linear_of(*ffn.gate, index);
  }
  expert.up = linear_of(*ffn.up, index);
  expert.down = linear_of(*ffn.down, index);
  expert.activation = &ffn.activation;
  expert.begin = begin;
  expert.end = end;
  work.experts.push_back(expert);
}

}  // namespace

void add_routed(const moefast_ffn& stack,
                const int32_t* indices,
                const float* weights,
                int64_t tokens,
                int64_t top_k,
                FeedForward& work) {
  const int64_t num_experts = stack.up->num_experts, routes = tokens * top_k;
  // A counting sort: stable, so each expert's routes stay in the order of the tokens.
  std::vector<int64_t> end(static_cast<size_t>(num_experts), 0);
  const auto exists = [&](int64_t i) { return indices[i] >= 0 && indices[i] < num_experts; };
  for (int64_t i = 0; i < routes; ++i) {
    if (exists(i)) {
      ++end[indices[i]];
    }
  }
  int64_t begin = static_cast<int64_t>(work.routes.size());
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t count = end[e];
    end[e] = begin;
    if (count > 0) {
      add_expert(stack, e, begin, begin + count, work);
      begin += count;
    }
  }
  work.routes.resize(static_cast<size_t>(begin));
  for (int64_t i = 0; i < routes; ++i) {
    if (exists(i)) {
      work.routes[end[indices[i]]++] = {static_cast<int32_t>(i / top_k), static_cast<int32_t>(i),
                                        weights ? weights[i] : 1.0f};
    }
  }
}

void add_shared(const moefast_ffn& shared,
                const float* weights,
                int64_t tokens,
                FeedForward& work) {
  const auto begin = static_cast<int64_t>(work.routes.size());
  for (int64_t t = 0; t < tokens; ++t) {
    work.routes.push_back(
        {static_cast<int32_t>(t), static_cast<int32_t>(t), weights ? weights[t] : 1.0f});
  }
  add_expert(shared, 0, begin, begin + tokens, work);
}

void run(moefast_engine& engine, const FeedForward& work) {
  Run(engine, work)();
}

}  // namespace moefast
