#include "runnable.h"

#include <utility>

#include "call.h"
#include "donation.h"
#include "mlx/backend/cpu/encoder.h"

namespace moefast::binding {

void evaluate(Runnable& runnable,
              mx::Stream stream,
              const std::vector<mx::array>& inputs,
              std::vector<mx::array>& outputs) {
  std::vector<mx::array> temporaries;
  auto work = runnable.prepare(inputs, outputs, temporaries, 1);
  if (!work) {
    return;
  }
  auto& encoder = mx::cpu::get_command_encoder(stream);
  encoder.add_temporaries(std::move(temporaries));
  encoder.dispatch([work = std::move(work), held = held_by_mlx(inputs, outputs), on = stream] {
    mend_task_count(on);
    work();
  });
}

}  // namespace moefast::binding
